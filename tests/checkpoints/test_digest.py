"""Digests against the libraries used directly, and what they must and must not depend on."""

import hashlib

import pytest
import torch
import xxhash

from fulgurite.checkpoints import (
    digest_of_bytes,
    digest_of_file,
    digest_of_json,
    digest_of_state,
    digest_of_tensor,
)
from fulgurite.checkpoints.digest import tensor_bytes


def test_against_the_libraries(tmp_path):
    data = bytes(range(256)) * 50_000
    (tmp_path / "f").write_bytes(data)
    fast, strong = xxhash.xxh3_128_hexdigest(data), hashlib.sha256(data).hexdigest()
    assert digest_of_bytes(data) == digest_of_file(tmp_path / "f") == f"xxh3_128:{fast}"
    assert digest_of_bytes(data, "sha256") == digest_of_file(tmp_path / "f", "sha256") == f"sha256:{strong}"
    tensor = torch.randn(3, 5)
    assert digest_of_tensor(tensor.T) == digest_of_bytes(tensor.T.contiguous().numpy().tobytes())


def test_unknown_algorithm():
    with pytest.raises(ValueError, match=r"'md5'.*xxh3_128"):
        digest_of_bytes(b"", "md5")


def test_state_digest_sees_names_types_shapes_and_values_but_not_order():
    a, b = torch.arange(6.0), torch.ones(2)
    state = digest_of_state({"a": a, "b": b})
    assert state == digest_of_state({"b": b, "a": a}) == digest_of_state([("b", b), ("a", a)])
    others = [
        {"a": a, "c": b},
        {"a": a, "b": -b},
        {"a": a.view(2, 3), "b": b},
        {"a": a, "b": b.view(torch.int32)},
    ]
    assert state not in {digest_of_state(other) for other in others}


def test_json_digest():
    assert digest_of_json({"a": 1, "b": [1, 2]}) == digest_of_json({"b": [1, 2], "a": 1})
    assert digest_of_json({"a": 1}) != digest_of_json({"a": 1.5})


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("step", [1, 2, 3, 8])
def test_views_of_any_length_and_step(length, step):
    tensor = torch.arange(float(length))[::step]
    assert bytes(tensor_bytes(tensor)) == tensor.numpy().tobytes()
    complex_values = torch.complex(tensor, tensor + 1)
    assert bytes(tensor_bytes(complex_values.conj())) == complex_values.numpy().conj().tobytes()
