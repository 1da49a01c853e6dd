"""Files changed by accident or on purpose: every change is found, its place is named, and nothing in it runs."""

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import (
    CheckpointError,
    DamagedError,
    MissingError,
    audit,
    load_document,
    load_pickle,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
    verify,
    write_json,
    write_text,
)
from fulgurite.checkpoints.digest import FileRecord, digest_of_bytes
from fulgurite.checkpoints.manifest import write_manifest
from fulgurite.checkpoints.tensorfile import write_tensors

RELEASED = Path(__file__).with_name("data") / "format-1"


def weights(value=0.0):
    generator = torch.Generator().manual_seed(1)
    return {
        "adapter.down.weight": torch.randn(24, 16, generator=generator) + value,
        "adapter.up.weight": torch.randn(16, 24, generator=generator).to(torch.bfloat16),
        "counts": torch.arange(5) + int(value),
    }


def save(path, value=0.0):
    state = {"step": 7, "moments": {"a": torch.full((16, 24), value), "b": torch.ones(3, dtype=torch.complex128)}}
    documents = {"state": state, "README.md": "# An adapter\n"}
    save_checkpoint_folder(path, {"weights": weights(value)}, documents, settings={"rate": 0.1}, facts={"step": 7})


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints and what commands write beside them."""
    root = tmp_path / "run"
    save(root / "checkpoints" / "step=1", 1.0)
    save(root / "checkpoints" / "last", 2.0)
    write_text(root / "config.yaml", "seed_everything: 1\nmodel: {class_path: Net}\n")
    write_json(root / "metrics.json", {"val/loss": 0.25})
    write_json(root / "results.json", {"matrix": [[0.5, 0.25], [0.125, 1.0]]})
    return root


def files_of(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def load_all(path):
    return load_tensors(path), load_document(path, "state"), load_document(path, "README.md")


def unsound(root, file):
    """Whether the audit says that ``file``, and nothing else, is damaged."""
    return [state.path for state in audit(root) if not state.sound] == [file]


def refused_naming(file):
    """Whether loading the checkpoint of ``file`` gives an error that names it and, if it is damage in one, a tensor."""
    try:
        load_all(file.parent)
    except CheckpointError as error:
        return file.name in str(error)
    return False


def test_a_thousand_flipped_bits(run, tally):
    generator, files, found, in_tensors, named = random.Random(0), files_of(run), 0, 0, 0
    assert {f.name for f in files} >= {"config.yaml", "results.json", "digests.json", "manifest.json", "state.json"}
    sizes = [file.stat().st_size for file in files]
    for turn in range(1000):
        # Half of them by size of the file, half of them any file.
        file = generator.choices(files, sizes if turn % 2 else None)[0]
        sound = file.read_bytes()
        changed = bytearray(sound)
        place = generator.randrange(len(sound))
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        single = file.parent == run
        found += unsound(run, file) and (single or refused_naming(file))
        if file.suffix == ".safetensors" and place >= 8 + int.from_bytes(sound[:8], "little"):
            in_tensors += 1
            named += any("tensor '" in problem for problem in verify(file.parent).problems)
        file.write_bytes(sound)
    tally("B2", 1000, found)
    assert found == 1000
    assert named == in_tensors > 300
    assert all(state.state == "good" for state in audit(run))


def test_cut_at_every_sector_and_lengthened(run, tally):
    injected = found = 0
    for file in files_of(run):
        sound = file.read_bytes()
        lengths = {0, 1, len(sound) - 1, *range(512, len(sound), 512)}
        for changed in (*(sound[:n] for n in lengths), sound + b"\0", sound + sound[:512], bytes(len(sound))):
            file.write_bytes(changed)
            injected += 1
            found += unsound(run, file) and (file.parent == run or refused_naming(file))
        file.write_bytes(sound)
    tally("B1", injected, found)
    assert found == injected > 100


def test_files_of_another_step_and_tensors_in_another_place(run, tally):
    one, last = run / "checkpoints" / "step=1", run / "checkpoints" / "last"
    found = injected = 0
    for file in files_of(last):
        sound, other = file.read_bytes(), (one / file.name).read_bytes()
        if file.name == "README.md":
            assert sound == other
        for foreign in [other] * (sound != other) + [None]:
            file.unlink() if foreign is None else file.write_bytes(foreign)
            injected += 1
            try:
                load_all(last)
            except CheckpointError as error:
                # Another step's manifest is sound in itself: it is what it says of the others that is wrong.
                found += file.name in str(error) or (file.name == "manifest.json" and "expected" in str(error))
            file.write_bytes(sound)
    tally("B3", injected, found)
    assert found == injected == 8


def resigned(folder, name, data):
    """Put ``data`` in the place of a file, with the digest and size in the manifest that fit it."""
    manifest = read_manifest(folder)
    (folder / name).write_bytes(data)
    manifest.files[name] = FileRecord(len(data), digest_of_bytes(data))
    write_manifest(folder, manifest)


def test_a_header_with_exchanged_or_doubled_names(run, tally):
    """The file's digest is right, so only what the manifest says of single tensors can find it."""
    last = run / "checkpoints" / "last"
    file = last / "weights.safetensors"
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    found = 0
    changes = [
        {name: entries[other] for name, other in zip(entries, [next(iter(entries)), *reversed(list(entries)[1:])])},
        {**entries, "adapter.down.weight": entries["adapter.down.weight"] | {"shape": [16, 24]}},
        {**entries, "counts": entries["counts"] | {"dtype": "F64"}},
        {**entries, "more": entries["counts"]},
        {name: entry for name, entry in entries.items() if name != "counts"},
    ]
    doubled = json.dumps(entries)[:-1] + f', "counts": {json.dumps(entries["adapter.up.weight"])}}}'
    for text in (*map(json.dumps, changes), doubled):
        raw = text.encode()
        resigned(last, "weights.safetensors", len(raw).to_bytes(8, "little") + raw + data[begin:])
        try:
            load_tensors(last)
        except DamagedError as error:
            found += "weights.safetensors" in str(error) and "tensor" in str(error)
    tally("B3", len(changes) + 1, found)
    assert found == len(changes) + 1


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_hostile_pickles_in_every_file(run, tmp_path, tally):
    """As they are, and with digests that fit them."""
    marker, found, injected = tmp_path / "marker", 0, 0
    bombs = [pickle.dumps(Bomb(marker), protocol) for protocol in (0, 2, 5)]
    torch.save({"state_dict": Bomb(marker)}, tmp_path / "bomb.pt")
    bombs.append((tmp_path / "bomb.pt").read_bytes())
    last = run / "checkpoints" / "last"
    for file in files_of(run):
        sound = {path: path.read_bytes() for path in (file, last / "manifest.json")}
        for bomb in bombs:
            for fits in (False, True):
                if fits and (file.parent != last or file.name in ("manifest.json", "README.md")):
                    continue
                resigned(last, file.name, bomb) if fits else file.write_bytes(bomb)
                injected += 1
                if file.parent == run:
                    found += unsound(run, file)
                else:
                    found += refused_naming(file)
                for path, content in sound.items():
                    path.write_bytes(content)
    tally("D1", injected, found * (not marker.exists()))
    assert not marker.exists()
    assert found == injected > 60


def test_links_and_names_that_leave_the_folder(run, tmp_path, tally):
    last, secret = run / "checkpoints" / "last", tmp_path / "secret.safetensors"
    found = 0
    record, tensors = write_tensors(secret, {"key": torch.ones(4)})
    for name in ("../secret.safetensors", str(secret), "a/../../secret.safetensors", "weights.safetensors/../x"):
        folder = shutil.copytree(last, tmp_path / f"copy{found}")
        manifest = read_manifest(folder)
        manifest.files[name], manifest.tensors[name] = record, tensors
        write_manifest(folder, manifest)
        with pytest.raises(CheckpointError, match="leaves the folder"):
            load_tensors(folder, name)
        found += not verify(folder).ok
    for file in ("weights.safetensors", "state.json"):
        folder = shutil.copytree(last, tmp_path / f"copy{found}")
        outside = tmp_path / f"outside-{file}"
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(outside)
        with pytest.raises(MissingError, match=rf"{file} is a link"):
            load_all(folder)
        found += not verify(folder).ok
    tally("D4", 6, found)
    assert found == 6


def peak_memory():
    """Highest resident bytes of this process since the last reset."""
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def grown(action):
    """By how much the highest memory of a child that runs ``action`` exceeds what it began with; its text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")
        before, text = peak_memory(), "no error"
        try:
            action()
        except CheckpointError as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps([peak_memory() - before, text]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        value = json.load(answer)
    os.waitpid(child, 0)
    return value


def test_bombs_are_refused_before_they_grow(tmp_path, tally):
    """Files of a few kB that say they hold gigabytes."""
    torch.save({"x": torch.zeros(8)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "zip.pt", "w") as zipped:
        for name in plain.namelist():
            data = bytes(1 << 28) if name.endswith("data/0") else plain.read(name)
            zipped.writestr(name, data, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "zip.pt").stat().st_size < 1 << 20
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "large").mkdir()
    save_checkpoint_folder(tmp_path / "large", {"weights": {"x": torch.ones(4)}})
    resigned(tmp_path / "large", "weights.safetensors", len(header).to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "length").mkdir()
    save_checkpoint_folder(tmp_path / "length", {"weights": {"x": torch.ones(4)}})
    resigned(tmp_path / "length", "weights.safetensors", struct.pack("<Q", 1 << 62) + bytes(16))
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    save_checkpoint_folder(tmp_path / "nested", {}, {"state": 1})
    resigned(tmp_path / "nested", "state.json", nested)
    (tmp_path / "long.pkl").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")
    cases = {
        "zip.pt": lambda: load_pickle(tmp_path / "zip.pt"),
        "large/weights": lambda: load_tensors(tmp_path / "large"),
        "length/weights": lambda: load_tensors(tmp_path / "length"),
        "nested/state": lambda: load_document(tmp_path / "nested", "state"),
        "long.pkl": lambda: load_pickle(tmp_path / "long.pkl"),
    }
    found = 0
    for name, action in cases.items():
        grew, text = grown(action)
        assert name in text, (name, text)
        assert grew < 64 << 20, (name, grew)
        found += 1
    tally("D4", len(cases), found)


def test_a_checkpoint_of_the_first_format_loads(tally):
    """Written once and kept: what a release has written is read by all that follow, or refused in words."""
    assert verify(RELEASED).ok
    manifest = read_manifest(RELEASED)
    assert (manifest.format_version, manifest.kind, manifest.facts["global_step"]) == (1, "delta", 3)
    tensors, state = load_tensors(RELEASED), load_document(RELEASED, "state")
    assert tensors["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert (tensors["h"].dtype, tensors["h"].tolist()) == (torch.bfloat16, [0.5, -2.0])
    assert state["pair"] == (1, None)
    assert state["moment"].tolist() == [0.25, 0.75]
    assert load_document(RELEASED, "README.md") == "Kept as it was written.\n"
    tally("G3", 1, 1)
