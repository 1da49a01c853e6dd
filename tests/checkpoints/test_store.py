"""Round trips of odd tensors, and damage of every kind is found before a value is used."""

import random
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.checkpoints import (
    CheckpointError,
    DamagedError,
    MissingError,
    RefusedError,
    digest_of_file,
    load_document,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
    verify,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
]


def same(a, b):
    """Equal in type, shape, and every bit, so that NaN counts as itself."""
    plain = [x.clone(memory_format=torch.contiguous_format).reshape(-1) for x in (a, b)]
    raw = [x.view(torch.uint8).tolist() for x in plain]
    return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        flat = torch.randint(0, 2, (count,), generator=generator).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8).view(dtype)
    tensor = flat.reshape(shape)
    if draw(st.booleans()):
        tensor = tensor.transpose(0, -1) if tensor.dim() > 1 else tensor
    return tensor[:: draw(st.integers(1, 3))] if tensor.dim() else tensor


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(state=st.dictionaries(names, tensors(), max_size=6), tie=st.booleans())
def test_round_trip(tmp_path_factory, state, tie):
    path = tmp_path_factory.mktemp("round") / "c"
    if tie and state:
        first = next(iter(state))
        state = {**state, first + " tied": state[first], first + " view": state[first].reshape(-1)[1:]}
    manifest = save_checkpoint_folder(path, {"weights": state})
    loaded = load_tensors(path)
    assert list(loaded) == list(state)
    assert all(same(loaded[name], state[name]) for name in state)
    assert verify(path).ok
    assert read_manifest(path) == manifest
    assert read_manifest(path).digest == manifest.digest
    shutil.rmtree(path)


def test_other_readers_open_the_files(tmp_path):
    state = {"w": torch.randn(3, 4), "é": torch.arange(3), "h": torch.randn(4, 2).bfloat16().T}
    state["b"] = torch.tensor(True)
    save_checkpoint_folder(tmp_path / "c", {"weights": state})
    other = safetensors.torch.load_file(tmp_path / "c" / "weights.safetensors")
    assert set(other) == set(state)
    assert all(torch.equal(other[name], state[name]) for name in state)


def test_ten_thousand_tensors(tmp_path):
    state = {f"layer.{index}.weight": torch.full((2,), float(index)) for index in range(10_000)}
    save_checkpoint_folder(tmp_path / "c", {"weights": state})
    loaded = load_tensors(tmp_path / "c")
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    save_checkpoint_folder(tmp_path / "c", {"weights": {"w": torch.ones(1000)}})
    before = digest_of_file(tmp_path / "c" / "weights.safetensors")
    load_tensors(tmp_path / "c")["w"].zero_()
    assert digest_of_file(tmp_path / "c" / "weights.safetensors") == before
    assert load_tensors(tmp_path / "c")["w"].sum() == 1000


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small"
    save_checkpoint_folder(
        path,
        {"weights": {"a": torch.arange(3.0), "b": torch.tensor([True, False])}},
        {"state": {"step": 3, "moment": torch.ones(2)}, "README.md": "# Card\n"},
        settings={"rate": 0.1},
        metrics={"accuracy": 0.5},
        facts={"epoch": 1},
    )
    return path


def load_all(path):
    return load_tensors(path), load_document(path, "state"), load_document(path, "README.md")


def test_every_changed_byte_is_found(small):
    load_all(small)
    generator, files = random.Random(0), sorted(small.iterdir())
    assert len(files) == 5
    for file in files:
        sound = file.read_bytes()
        for place in range(len(sound)):
            changed = bytearray(sound)
            changed[place] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                load_all(small)
            assert not verify(small).ok
        file.write_bytes(sound)
    load_all(small)
    assert verify(small).ok


def test_every_truncation_and_extension_is_found(small):
    for file in small.iterdir():
        sound = file.read_bytes()
        for changed in [sound[:n] for n in {*range(0, len(sound), 7), 1, len(sound) - 1}] + [
            sound + b"\0",
            sound + b"\n",
            b"\n" + sound,
        ]:
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                load_all(small)
        file.write_bytes(sound)


def test_missing_files_are_named(small):
    for name in ("weights.safetensors", "state.safetensors", "state.json", "README.md", "manifest.json"):
        file = small / name
        sound = file.read_bytes()
        file.unlink()
        with pytest.raises(MissingError, match=name):
            load_all(small)
        assert not verify(small).ok
        file.write_bytes(sound)


def test_a_damaged_tensor_is_named_with_both_digests(small):
    file = small / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(torch.tensor(2.0).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    expected = read_manifest(small).tensors["weights.safetensors"]["a"].digest
    for load in (lambda: load_tensors(small), lambda: load_tensors(small, names=["a"])):
        with pytest.raises(DamagedError, match=rf"weights\.safetensors.*'a'.*{expected}"):
            load()
    assert load_tensors(small, names=["b"])["b"].tolist() == [True, False]
    report = verify(small)
    assert [("'a'" in text, str(file) in text) for text in report.problems] == [(True, True)]
    good = {name for name, problems in report.files.items() if not problems}
    assert good == {"state.safetensors", "state.json", "README.md", "manifest.json"}
    assert load_tensors(small, verify=False)["a"][2] != 2


def test_swapped_files_and_swapped_tensors(tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        state = {"a": torch.full((4,), value), "b": torch.full((4,), -value)}
        save_checkpoint_folder(tmp_path / name, {"weights": state, "other": state})
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copy(two / "weights.safetensors", one / "weights.safetensors")
    with pytest.raises(DamagedError, match="weights"):
        load_tensors(one)
    with pytest.raises(DamagedError, match="'b'"):
        load_tensors(one, names=["b"])
    file = two / "other.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"?"').replace(b'"b"', b'"a"').replace(b'"?"', b'"b"'))
    with pytest.raises(DamagedError, match="'a'"):
        load_tensors(two, "other", names=["a"])
    shutil.copy(one / "manifest.json", two / "manifest.json")
    with pytest.raises(DamagedError, match="weights"):
        load_tensors(two)


def test_a_link_out_of_the_folder_is_refused(small, tmp_path):
    outside = tmp_path / "outside"
    (small / "README.md").rename(outside)
    (small / "README.md").symlink_to(outside)
    with pytest.raises(MissingError, match=r"README\.md is a link"):
        load_document(small, "README.md")


def test_unlisted_files_are_reported_and_never_read(small):
    (small / "extra.pkl").write_bytes(b"junk")
    report = verify(small)
    assert report.ok
    assert report.extra == ["extra.pkl"]


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.empty(2, device="meta"), "'x'.*meta"),
        (torch.eye(2).to_sparse(), "'x'.*dense"),
        ("text", "'x'.*str"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(small, tensor, text):
    with pytest.raises(RefusedError, match=text):
        save_checkpoint_folder(small, {"weights": {"x": tensor}})
    assert len(load_all(small)) == 3
    assert [entry.name for entry in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/b", "manifest.json", ".."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(RefusedError, match="name"):
        save_checkpoint_folder(tmp_path / "c", {}, {name: {"a": 1}})


def test_asking_for_what_is_not_there(small, tmp_path):
    with pytest.raises(MissingError, match=r"no optimizer\.safetensors; it holds README\.md"):
        load_tensors(small, "optimizer")
    with pytest.raises(MissingError, match="'c'"):
        load_tensors(small, names=["c"])
    with pytest.raises(MissingError, match="does not exist"):
        load_tensors(tmp_path / "nowhere")
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(MissingError, match=r"x\.ckpt is a file"):
        load_tensors(tmp_path / "x.ckpt")


def test_sha256_on_request(tmp_path):
    manifest = save_checkpoint_folder(tmp_path / "c", {"weights": {"a": torch.ones(3)}}, algorithm="sha256")
    assert manifest.files["weights.safetensors"].digest.startswith("sha256:")
    assert load_tensors(tmp_path / "c")["a"].sum() == 3
