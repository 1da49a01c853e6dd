"""Foreign pickles are read; hostile ones are refused by name, and nothing in them runs."""

import os
import pickle
import random
import resource
import time
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch

from fulgurite.checkpoints import CheckpointError, DamagedError, MissingError, RefusedError, load_pickle


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


@pytest.mark.parametrize("protocol", range(6))
def test_subtitles_and_arrays(tmp_path, protocol):
    value = {
        "vid_1": "a man says: 'héllo'",
        2: ["x", ("y", None, True, 1.5, 1 << 80)],
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "ordered": OrderedDict(a=1),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["a", "bc"]),
        "scalar": np.float64(2.5),
    }
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(value, protocol))
    found = load_pickle(tmp_path / "s.pkl")
    assert list(found) == list(value)
    for key in ("array", "fortran", "text"):
        assert found[key].dtype == value[key].dtype
        assert np.array_equal(found.pop(key), value.pop(key))
    assert found == value


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_features(tmp_path, zipped):
    value = {"v1": torch.randn(10, 4), 7: torch.ones(2).half(), "n": np.arange(3.0), "s": np.float32(2)}
    torch.save(value, tmp_path / "f.pth", _use_new_zipfile_serialization=zipped)
    found = load_pickle(tmp_path / "f.pth")
    assert torch.equal(found["v1"], value["v1"])
    assert torch.equal(found[7], value[7])
    assert np.array_equal(found["n"], value["n"])
    assert found["s"] == 2


def test_tensor_in_a_plain_pickle(tmp_path):
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"a": torch.arange(4)}))
    assert load_pickle(tmp_path / "t.pkl")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle(tmp_path, protocol):
    marker = tmp_path / "marker"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": "fine", "b": Bomb(marker)}, protocol))
    with pytest.raises(RefusedError, match=r"x\.pkl asks for (posix|nt)\.system"):
        load_pickle(tmp_path / "x.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_file(tmp_path, zipped):
    marker = tmp_path / "marker"
    value = {"a": torch.ones(1), "b": Bomb(marker)}
    torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RefusedError, match=r"x\.pth asks for (posix|nt)\.system"):
        load_pickle(tmp_path / "x.pth")
    assert not marker.exists()


def test_hostile_pickles_inside_allowed_functions(tmp_path):
    marker = tmp_path / "marker"
    inner = pickle.dumps(Bomb(marker))

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    objects = np.array([Bomb(marker)], dtype=object)
    for name, value in (("nested", Nested()), ("objects", objects), ("eval", Evil())):
        (tmp_path / name).write_bytes(pickle.dumps(value))
        with pytest.raises(CheckpointError, match=name):
            load_pickle(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["subprocess.Popen", "torch.hub.load", "numpy.load", "builtins.getattr"])
def test_refused_global_is_named(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    (tmp_path / "x").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(RefusedError, match=name):
        load_pickle(tmp_path / "x")


def test_damaged_files(tmp_path):
    torch.save({"v": torch.randn(100)}, tmp_path / "f.pth")
    data = bytearray((tmp_path / "f.pth").read_bytes())
    place = data.index(torch.load(tmp_path / "f.pth")["v"].numpy().tobytes()) + 17
    data[place] ^= 4
    (tmp_path / "f.pth").write_bytes(data)
    with pytest.raises(DamagedError, match=r"f\.pth.*checksum"):
        load_pickle(tmp_path / "f.pth")
    with pytest.raises(MissingError, match="gone"):
        load_pickle(tmp_path / "gone")


def test_only_typed_errors_escape_from_broken_streams(tmp_path):
    generator, file = random.Random(1), tmp_path / "x.pkl"
    sources = [pickle.dumps({"a": ["text", 1.5, np.arange(4)], "b": torch.ones(3)}, p) for p in (0, 2, 4)]
    torch.save({"a": torch.ones(3)}, file)
    sources.append(file.read_bytes())
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    sources.append(file.read_bytes())
    for source in sources:
        for _ in range(150):
            length = generator.randrange(len(source)) if generator.random() < 0.3 else len(source)
            data = bytearray(source[:length])
            for _ in range(generator.randrange(1, 4)):
                if data:
                    data[generator.randrange(len(data))] = generator.randrange(256)
            file.write_bytes(data)
            with suppress(CheckpointError):
                load_pickle(file)


def test_no_change_of_a_hostile_pickle_makes_it_run(tmp_path):
    """Flipped bytes of files that want to run a command: whatever comes out, the command does not run."""
    generator, file, marker = random.Random(2), tmp_path / "x.pkl", tmp_path / "marker"
    value = {"text": "a", "array": np.arange(3), "bomb": Bomb(marker)}
    sources = [pickle.dumps(value, protocol) for protocol in (0, 2, 4)]
    for zipped in (True, False):
        torch.save({"t": torch.ones(2), "bomb": Bomb(marker)}, file, _use_new_zipfile_serialization=zipped)
        sources.append(file.read_bytes())
    refused = 0
    for source in sources:
        for _ in range(100):
            data = bytearray(source)
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(data)
            try:
                load_pickle(file)
            except RefusedError:
                refused += 1
            except CheckpointError:
                pass
            assert not marker.exists()
    assert refused > 50


def test_a_few_bytes_that_ask_for_much(tmp_path):
    """A memo of a billion entries; one tuple that is met 2**60 times; changed defaults of a known function."""
    file = tmp_path / "x.pkl"
    file.write_bytes(b"\x80\x02](K\x01r" + (1 << 30).to_bytes(4, "little") + b"e.")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert load_pickle(file) == [1]
    file.write_bytes(b"\x80\x02K\x01" + b"2\x86" * 60 + b".")
    assert len(load_pickle(file)) == 2
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    kept = torch._utils._rebuild_tensor_v2.__defaults__
    file.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__N\x85s\x86b.")
    with pytest.raises(DamagedError, match="attributes for a function"):
        load_pickle(file)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == kept


def test_state_dicts_keep_their_attributes(tmp_path):
    state = OrderedDict(weight=torch.ones(2))
    state._metadata = {"": {"version": 2}}
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(state))
    assert load_pickle(tmp_path / "s.pkl")._metadata == state._metadata
