"""The centroid router against its formula in NumPy, and what its weights must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fulgurite.methods.routing.centroid import CentroidRouter, mixing_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(train: list[np.ndarray], test: np.ndarray, k: int, temperature: float) -> np.ndarray:
    centroids = np.stack([t.astype(np.float64).mean(0) for t in train])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    scores = test.astype(np.float64) / np.linalg.norm(test.astype(np.float64), axis=1, keepdims=True) @ centroids.T
    for row in scores:
        row[np.argsort(-row, kind="stable")[k:]] = -np.inf
    shares = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize(("top_k", "temperature"), [(2, 0.01), (1, 1.0), (3, 0.5), (0, 0.1), (9, 0.1)])
def test_weights_equal_the_formula(top_k, temperature):
    train = [draw(30, 8, seed=i) + 0.5 * i for i in range(3)]
    test = draw(10, 8, seed=7)
    router = CentroidRouter(top_k, temperature, width=8, experts=["x", "y", "z"])
    for name, features in zip("xyz", train):
        router.update(features, name)
    expected = reference([t.numpy() for t in train], test.numpy(), top_k if 0 < top_k <= 3 else 3, temperature)
    np.testing.assert_allclose(router(test).numpy(), expected, atol=1e-6)


def test_rows_are_sparse_sum_to_one_and_ignore_a_constant():
    scores = draw(50, 6).double()
    for top_k in (1, 2, 4):
        weights = mixing_weights(scores, top_k, 0.05)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))
        assert ((weights > 0).sum(1) <= top_k).all()
        torch.testing.assert_close(mixing_weights(scores + 3.0, top_k, 0.05), weights)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mixing_weights(scores[:, order], top_k, 0.05), weights[:, order])


def test_limits_are_one_hot_and_the_static_average():
    scores = draw(20, 5).double()
    one_hot = torch.nn.functional.one_hot(scores.argmax(1), 5).double()
    assert torch.equal(mixing_weights(scores, 1, 0.3), one_hot)
    assert torch.equal(mixing_weights(scores, 3, 1e-6), one_hot)
    torch.testing.assert_close(mixing_weights(scores, 0, 1e9), torch.full((20, 5), 0.2, dtype=torch.float64))
    assert torch.equal(mixing_weights(scores[:, :1], 2), torch.ones(20, 1, dtype=torch.float64))


def test_ties_keep_the_first_experts():
    assert mixing_weights(torch.zeros(1, 4), top_k=2).tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_later_experts_are_not_used_before_they_exist():
    scores = draw(20, 5)
    early = mixing_weights(scores, 2, 0.1, num_models=3)
    torch.testing.assert_close(early[:, :3], mixing_weights(scores[:, :3], 2, 0.1))
    assert (early[:, 3:] == 0).all()


def test_given_probabilities_are_kept_and_scaled():
    weights = mixing_weights(torch.tensor([[0.5, 0.2, 0.3]]), top_k=2, is_prob=True)
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.0, 0.375]]))


def test_the_mean_streams_in_any_order_on_any_number_of_processes():
    features = draw(101, 16) * 100 + 1000
    expected = features.double().mean(0)
    whole, shuffled = (CentroidRouter(width=16, experts=["a"]) for _ in range(2))
    whole.update(features, "a")
    for part in features[torch.randperm(101, generator=torch.Generator().manual_seed(1))].split(7):
        shuffled.update(part, "a")
    ranks = [CentroidRouter(width=16, experts=["a"]) for _ in range(2)]
    sums: list[Tensor] = []
    CentroidRouter(width=16, experts=["a"]).update(features[1::2], "a", reduce=lambda t: sums.append(t) or t)
    for router in ranks:
        router.update(features[::2], "a", reduce=lambda t: t + sums[0])
    for router in (whole, shuffled, *ranks):
        torch.testing.assert_close(router.centroids[0], expected, rtol=1e-12, atol=0)
        assert router.counts.tolist() == [101]
    whole.update(features[:0], "a")
    assert whole.counts.tolist() == [101]


def test_parts_are_joined_as_they_are_or_scaled_one_by_one():
    small, large = draw(40, 4), 100 * draw(40, 6, seed=1)
    joined = torch.cat([small, large], dim=1)
    published = CentroidRouter(width=10, experts=["a", "b"])
    scaled = CentroidRouter(normalize_parts=True, width=10, experts=["a", "b"])
    whole = CentroidRouter(width=10, experts=["a", "b"])
    for rows, name in ((slice(0, 20), "a"), (slice(20, 40), "b")):
        published.update((small[rows], large[rows]), name)
        scaled.update((small[rows], large[rows]), name)
        whole.update(joined[rows], name)
    assert torch.equal(published.similarities((small, large)), whole.similarities(joined))
    unit = torch.cat([p / p.norm(dim=1, keepdim=True) for p in (small.double(), large.double())], dim=1)
    torch.testing.assert_close(scaled.centroids[0], unit[:20].mean(0))


def test_sums_survive_checkpoints_growth_and_a_change_of_precision():
    router = CentroidRouter(width=4, experts=["a"])
    router.update(draw(10, 4), "a")
    router.add("b")
    router.update(draw(10, 4, seed=1), "b")
    twin = CentroidRouter()
    twin.build(4, ["a", "b"])
    twin.load_state_dict(router.state_dict())
    expected = router(draw(3, 4, seed=2))
    assert torch.equal(twin(draw(3, 4, seed=2)), expected)
    assert twin.bfloat16().sums.dtype == torch.float64
    assert torch.equal(twin(draw(3, 4, seed=2)), expected)
    twin.reset("b")
    assert twin.counts.tolist() == [10, 0]


def test_misuse_is_one_clear_error():
    router = CentroidRouter(width=4, experts=["a", "b"])
    router.update(draw(3, 4), "a")
    with pytest.raises(ValueError, match=r"no training features of \['b'\]"):
        router(draw(2, 4))
    assert router(draw(2, 4), num_models=1).tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ValueError, match=r"parts of width \[2, 3\].*built for 4"):
        router.update((draw(3, 2), draw(3, 3)), "a")
    with pytest.raises(LookupError, match=r"no expert 'c'; there are \['a', 'b'\]"):
        router.update(draw(3, 4), "c")
    with pytest.raises(ValueError, match="any expert"):
        CentroidRouter()(draw(2, 4))
    with pytest.raises(ValueError, match="num_models=3"):
        mixing_weights(draw(2, 2), num_models=3)
    with pytest.raises(ValueError, match="temperature=0"):
        CentroidRouter(temperature=0)
    with pytest.raises(ValueError, match="twice"):
        router.build(4, ["a", "a"])
    with pytest.raises(ValueError, match="exists already"):
        router.add("a")
    with pytest.raises(ValueError, match="without a width"):
        CentroidRouter(experts=["a"])
