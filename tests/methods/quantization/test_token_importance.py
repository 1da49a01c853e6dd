import pytest
import torch

from fulgurite.methods.quantization.attention_mass import attention_mass
from fulgurite.methods.quantization.token_importance import (
    centroid_importance,
    change_importance,
    chunk_importance,
    dot_importance,
    frequency_importance,
    kmeans,
    norm_importance,
    similarity_importance,
    token_counts,
    token_weights,
)
from fulgurite.methods.statistics.gram import gram_of, token_shares


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_mass_is_the_column_sum_of_the_probabilities(causal, masked, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.quantization.attention_mass.PIECE", 3 * 4 * 7 * 2)  # two queries at once
    query, key = draw(3, 4, 7, 5), draw(3, 2, 7, 5, seed=1)
    mask = MASK if masked else None
    found = attention_mass(query, key, mask=mask, causal=causal)
    scores = query @ key.repeat_interleave(2, dim=1).mT / 5**0.5
    allowed = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    if causal:
        allowed = allowed & torch.ones(7, 7, dtype=torch.bool).tril()
    if masked:
        allowed = allowed & (MASK[:, None, None, :] != 0)
    shares = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    if masked:
        shares = shares * MASK[:, None, :, None]
    torch.testing.assert_close(found, shares.sum((1, 2)), rtol=1e-12, atol=1e-12)
    real = MASK.sum(1).double() if masked else torch.full((3,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(found.sum(1), 4 * real, rtol=1e-12, atol=0)
    assert (found >= 0).all()


@pytest.mark.parametrize("added", [True, False])
def test_what_the_product_adds_to_its_scores_counts_too(added, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.quantization.attention_mass.PIECE", 3 * 4 * 7 * 2)
    query, key = draw(3, 4, 7, 5), draw(3, 2, 7, 5, seed=1)
    bias = draw(3, 1, 7, 7, seed=2)
    if not added:
        bias = bias > 0
        bias[1, 0, 2] = False  # this query sees nothing
    found = attention_mass(query, key, causal=False, bias=bias)
    scores = query @ key.repeat_interleave(2, dim=1).mT / 5**0.5
    scores = scores + bias if added else scores.masked_fill(~bias, -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1).nan_to_num(0).sum((1, 2)))


def test_attention_sinks_receive_most():
    query, key = draw(1, 2, 30, 8), draw(1, 2, 30, 8, seed=1)
    key[:, :, 0] = 5 * query.mean(2)
    query += 2 * query.mean(2, keepdim=True)
    assert attention_mass(query, key, scale=3.0)[0].argmax() == 0
    with pytest.raises(ValueError, match="do not fit queries"):
        attention_mass(query, draw(1, 3, 30, 8))
    with pytest.raises(ValueError, match="mask"):
        attention_mass(query, key, mask=MASK)


def test_raw_importance_is_that_of_loops():
    x, y = draw(3, 7, 4), draw(3, 7, 4, seed=1)
    for mask in (None, MASK):
        for b in range(3):
            others = [u for u in range(7) if mask is None or mask[b, u]]
            for t in range(7):
                distance = sum(((x[b, t] - x[b, u]) ** 2).sum() for u in others) / len(others)
                torch.testing.assert_close(similarity_importance(x, mask)[b, t], distance)
                torch.testing.assert_close(dot_importance(x, mask)[b, t], sum(x[b, t] @ x[b, u] for u in others))
    torch.testing.assert_close(norm_importance(x), (x**2).sum(-1).sqrt())
    torch.testing.assert_close(change_importance(x, y), -((x - y) ** 2).sum(-1).sqrt())
    centroids = draw(5, 4, seed=2)
    distances = ((x[:, :, None] - centroids) ** 2).sum(-1).sqrt()
    torch.testing.assert_close(centroid_importance(x, centroids), distances.min(-1).values)


def test_frequencies_go_with_the_token_whatever_the_order_of_examples():
    ids = torch.tensor([[1, 1, 2, 0], [3, 1, 2, 2], [0, 3, 3, 3]])
    counts = token_counts([ids[:2], ids[2:]], 5)
    assert counts.tolist() == [2, 3, 3, 4, 0]
    order = [2, 0, 1]
    assert torch.equal(frequency_importance(ids[order], counts), frequency_importance(ids, counts)[order])
    assert frequency_importance(ids, counts)[0].tolist() == [-3, -3, -3, -2]
    masked = token_counts([ids], 5, [torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])])
    assert masked.tolist() == [0, 2, 0, 2, 0]


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    rows = (centres[:, None] + 0.1 * draw(3, 20, 2)).reshape(-1, 2)
    best = min(
        (kmeans(rows, 3, seed=seed) for seed in range(4)), key=lambda c: torch.cdist(rows, c).amin(1).sum().item()
    )
    torch.testing.assert_close(best[best.sum(1).argsort()][0], centres[0], rtol=0, atol=0.1)
    assert torch.equal(kmeans(rows, 3, seed=1), kmeans(rows, 3, seed=1))
    with pytest.raises(ValueError, match="num_centroids=100"):
        kmeans(rows)


def test_chunks():
    assert chunk_importance("0_4", 2, 8).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2
    assert chunk_importance("0_3_4", 1, 8).tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]
    for wrong in ("4", "4_4", "a_4", "0_-1"):
        with pytest.raises(ValueError, match="chunks"):
            chunk_importance(wrong, 1, 8)


def loop_weights(a, low=0.005, high=1.0, quantile=None, masking=None, truncate=None, num_bins=None, normalize=None):
    """One example without padding, as the specification says it."""
    length = len(a)
    if normalize:
        a = torch.stack([v / (length - t) ** (1.0 if normalize == "linear" else 0.5) for t, v in enumerate(a)])
    first, last = (a.min(), a.max()) if quantile is None else (a.quantile(1 - quantile), a.quantile(quantile))
    r = torch.stack([((v - first) / (last - first)).clamp(0, 1) * (high - low) + low for v in a])
    order = r.argsort(stable=True) if num_bins is None else a.argsort(stable=True)
    for rank, t in enumerate(order):
        if masking is not None:
            r[t] = float(rank >= int(masking * length))
        if truncate is not None and rank < int(truncate * length):
            r[t] = 0
        if num_bins is not None:
            r[t] = torch.linspace(low, high, num_bins, dtype=a.dtype)[rank * num_bins // length]
    return r


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantile": 0.8},
        {"masking": 0.3},
        {"truncate": 0.5},
        {"num_bins": 3},
        {"normalize": "linear"},
        {"normalize": "sqrt", "quantile": 0.9, "truncate": 0.2},
    ],
    ids=str,
)
def test_weights_are_those_of_a_loop_and_padding_takes_no_part(settings):
    a = draw(3, 7).abs()
    expected = torch.stack([loop_weights(row, **settings) for row in a])
    torch.testing.assert_close(token_weights(a, **settings), expected, rtol=1e-12, atol=1e-12)
    found = token_weights(a.masked_fill(MASK == 0, 1e9), MASK, **settings)
    for row, mask, weights in zip(a, MASK, found):
        real = mask != 0
        torch.testing.assert_close(weights[real], loop_weights(row[real], **settings), rtol=1e-12, atol=1e-12)
        assert (weights[~real] == 0).all()


def test_weights_lie_between_minimum_and_maximum_and_reverse():
    a = draw(3, 7).abs()
    up, down = token_weights(a, minimum=0.1, maximum=2.0), token_weights(a, minimum=2.0, maximum=0.1)
    torch.testing.assert_close(up.amin(1), torch.full((3,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(up + down, torch.full((3, 7), 2.1, dtype=torch.float64))
    assert torch.equal(up.argsort(1), down.argsort(1, descending=True))
    torch.testing.assert_close(token_weights(a, power="square"), token_weights(a**2))
    torch.testing.assert_close(token_weights(a, power="sqrt"), token_weights(a**0.5))


@pytest.mark.parametrize("settings", [{}, {"masking": 0.5}, {"num_bins": 4}, {"quantile": 0.9}], ids=str)
def test_constant_importance_counts_every_real_token_once(settings):
    weights = token_weights(torch.full((3, 7), 2.5), MASK, **settings)
    assert torch.equal(weights, MASK.float())
    assert torch.equal(token_weights(torch.zeros(1, 4), torch.zeros(1, 4), **settings), torch.zeros(1, 4))


def test_only_ratios_matter_to_the_gram_and_a_mask_drops_tokens():
    x, r = draw(2, 6, 3), draw(2, 6, seed=1).abs()

    def gram(weights):
        return gram_of(x.flatten(0, 1), token_shares(weights).flatten(), torch.float64)

    torch.testing.assert_close(gram(r * 7), gram(r), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram(torch.full_like(r, 0.3)), gram_of(x.flatten(0, 1), None, torch.float64))
    first = torch.tensor([[1.0, 1, 1, 0, 0, 0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(gram(first), 2 * gram_of(x[:, :3].flatten(0, 1), None, torch.float64))


def test_wrong_arguments_are_refused():
    a = draw(2, 5).abs()
    for settings, message in (
        ({"masking": 0.5, "num_bins": 2}, "only one of masking, num_bins"),
        ({"masking": 1.0}, "masking=1"),
        ({"quantile": 0.4}, "quantile=0"),
        ({"minimum": -1.0}, "minimum=-1"),
        ({"num_bins": 0}, "num_bins=0"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(a, **settings)
    with pytest.raises(ValueError, match="negative importance"):
        token_weights(-a, power="sqrt")
    with pytest.raises(ValueError, match="not finite"):
        token_weights(a / 0)
    with pytest.raises(ValueError, match="examples, tokens"):
        token_weights(a, MASK)


def test_the_trace_of_white_inputs_does_not_depend_on_the_weights():
    """Every row has the squared norm D, so the trace of the mean is D whatever the tokens count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (3, 7, 5), generator=generator).double() * 2 - 1
    for seed in range(3):
        importance = torch.rand(3, 7, generator=generator, dtype=torch.float64) ** (seed + 1)
        shares = token_shares(importance)
        assert shares.sum(1).tolist() == pytest.approx([7.0] * 3)
        gram = gram_of(x.flatten(0, 1), shares.flatten(), torch.float64) / shares.sum()
        assert gram.trace().item() == pytest.approx(5.0)
