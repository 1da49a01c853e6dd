import json

import pytest
import torch

from fulgurite.methods.quantization.hadamard import Rotation, hadamard_transform
from fulgurite.methods.quantization.hadamard_matrices import (
    WILLIAMSON,
    base_matrix,
    can_construct,
    prime_power,
    split_size,
    sylvester,
)

PUBLISHED = [12, 20, 28, 36, 40, 48, 52, 60, 108, 140, 148, 156, 172]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("order", [k for k in range(4, 130, 4) if can_construct(k)] + [148, 244, *WILLIAMSON])
def test_base_matrices_are_hadamard(order):
    matrix = base_matrix(order).long()
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


def test_every_published_size_and_those_of_common_models_have_a_matrix():
    for size in (*PUBLISHED, 768, 896, 1536, 3584, 4864, 5120, 8192, 11008, 13824, 14336, 18944, 27648, 28672):
        base, power = split_size(size)
        assert base * power == size
        assert power & (power - 1) == 0
    assert split_size(360) is not None  # where the published search stops at 60 and fails
    assert [size for size in (0, 3, 6, 15, 4304, 188) if split_size(size) is not None] == []
    assert [prime_power(q) for q in (2, 27, 49, 12, 1)] == [(2, 1), (3, 3), (7, 2), None, None]


def dense(size):
    base, power = split_size(size)
    return torch.kron(base_matrix(base).double(), sylvester(power).double()) / size**0.5


@pytest.mark.parametrize("size", [1, 2, 8, 12, 40, 56, 72, 172, 360, 512])
def test_the_fast_form_is_the_dense_product_and_its_transpose_the_inverse(size, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.quantization.hadamard.PIECE", 3 * size)
    x, matrix = draw(2, 4, size), dense(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x), x @ matrix.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x, transposed=True), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), transposed=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_gives_the_same_and_narrow_types_are_widened(dtype):
    x = draw(5, 24, dtype=torch.float32).to(dtype)
    expected = (x.double() @ dense(24).T).to(dtype)
    found = hadamard_transform(x)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps * 2, atol=2e-6)
    assert hadamard_transform(x, in_place=True) is x
    assert torch.equal(x, found)
    with pytest.raises(ValueError, match="contiguous"):
        hadamard_transform(draw(24, 24).T, in_place=True)
    turned = draw(12, 24).T
    torch.testing.assert_close(hadamard_transform(turned), turned @ dense(12).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rotation",
    [
        Rotation.hadamard(24, seed=5),
        Rotation.hadamard(12),
        Rotation.hadamard(6, seed=1, fallback="blocks"),
        Rotation.hadamard(7, seed=1, fallback="gaussian"),
        Rotation(("hadamard", "identity"), (4, 3)),
        Rotation(("identity", "hadamard"), (3, 8), seed=2),
    ],
    ids=str,
)
def test_rotations_are_orthogonal_differentiable_and_stored_as_plain_values(rotation):
    matrix, identity = rotation.matrix(), torch.eye(rotation.size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    x = draw(3, rotation.size).requires_grad_(True)
    torch.testing.assert_close(rotation(x), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation(x, inverse=True), x @ matrix.T, rtol=0, atol=1e-12)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda x, inverse=inverse: rotation(x, inverse), (x,))
    again = Rotation.from_data(json.loads(json.dumps(rotation.data())))
    assert again == rotation
    assert torch.equal(again.matrix(), matrix)


def test_signs_are_those_of_the_published_code_and_gaussian_ones_make_r_positive():
    drawn = torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(5))
    expected = (2 * drawn - 1).double()[:, None] * dense(24).T
    torch.testing.assert_close(Rotation.hadamard(24, seed=5).matrix(), expected, rtol=0, atol=1e-12)
    gaussian = draw(7, 7, seed=3)
    upper = Rotation(("gaussian",), (7,), 3).matrix().T @ gaussian
    torch.testing.assert_close(upper.tril(-1), torch.zeros(7, 7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (upper.diagonal() > 0).all()


def test_blocks_leave_runs_of_the_largest_power_of_two():
    x = draw(2, 12)
    assert Rotation.hadamard(24, fallback="blocks").kinds == ("hadamard",)
    found = Rotation(("identity", "hadamard"), (3, 4))(x)
    torch.testing.assert_close(found, (x.view(2, 3, 4) @ dense(4)).flatten(1), rtol=0, atol=1e-12)
    assert Rotation.hadamard(36 * 5 * 2 + 4 * 9 * 4 + 4, fallback="blocks").size == 508


def test_sizes_without_a_matrix_are_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match=r"size 6 .*fallback='blocks'"):
        Rotation.hadamard(6)
    with pytest.raises(ValueError, match="needs a seed"):
        Rotation.hadamard(6, fallback="gaussian")
    with pytest.raises(ValueError, match="fallback='none'"):
        Rotation.hadamard(8, fallback="none")
    with pytest.raises(ValueError, match="dimension of 9, expected 8"):
        Rotation.hadamard(8)(draw(2, 9))
