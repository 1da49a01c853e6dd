"""Multi-SLERP against the published steps, with their tangent, and against SLERP."""

import pytest
import torch

from fulgurite.methods.merging.multislerp import MultiSlerp
from fulgurite.methods.merging.slerp import Slerp


def draw(num, *shape, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def published(vectors, weights):
    """All steps of the equations, on whole vectors in float64."""
    x = vectors.double().flatten(1)
    w = torch.tensor(weights).double() / sum(weights)
    lengths = x.norm(dim=1)
    units = x / (lengths + 1e-8)[:, None]
    mean = w @ units
    mean = mean / mean.norm()
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    size = tangent.norm()
    turned = mean * size.cos() + (tangent * size.sin() / size if size > 1e-12 else 0)
    return (turned * (w @ lengths)).view(vectors.shape[1:]).float()


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5], [1.0, -0.2, 1.0]])
def test_is_the_published_form(weights):
    x, base = draw(3, 4, 6), draw(1, 4, 6, seed=1)[0]
    models = [{"x": v} for v in x]
    torch.testing.assert_close(MultiSlerp()(models, weights=weights)["x"], published(x, weights))
    merged = MultiSlerp(task_vectors=True)(models, {"x": base}, weights)["x"]
    torch.testing.assert_close(merged, base + published(x - base, weights))


def test_two_of_equal_length_and_weight_are_slerps_middle():
    x = draw(2, 30)
    x = x / x.norm(dim=1, keepdim=True)
    models = [{"x": v} for v in x]
    torch.testing.assert_close(MultiSlerp()(models)["x"], Slerp(0.5)(models)["x"])


def test_opposite_models_are_on_the_line_and_more_of_them_an_error():
    x = draw(1, 10)[0]
    merged = MultiSlerp()([{"x": x}, {"x": -3 * x}])["x"]
    torch.testing.assert_close(merged, -x)
    with pytest.raises(ArithmeticError, match=r"x: the directions of the models cancel"):
        MultiSlerp()([{"x": x}, {"x": -x}, {"x": x}], weights=[1, 2, 1])
    with pytest.raises(ValueError, match="divides weights by their sum"):
        MultiSlerp()([{"x": x}, {"x": x}], weights=[1, -1])


def test_models_of_zeros():
    x, zero = draw(1, 10)[0], torch.zeros(10)
    assert torch.equal(MultiSlerp()([{"x": zero}] * 3)["x"], zero)
    torch.testing.assert_close(MultiSlerp()([{"x": x}, {"x": zero}])["x"], x / 2)
