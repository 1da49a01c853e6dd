"""Search in two stages against a sort of everything."""

import pytest
import torch

from fulgurite.methods.retrieval.two_stage import coarse_candidates, two_stage_search

QUERIES, STORE, WIDTH = 5, 203, 8


@pytest.fixture
def queries():
    return torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store():
    return torch.randn(STORE, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def levels():
    """(L, Q, N) of which the first is not used: the fine levels are free to differ."""
    return torch.randn(3, QUERIES, STORE, generator=torch.Generator().manual_seed(2))


def best(scores, count):
    """Indices of each row, best first, the lower first among equals."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:count] for row in scores.tolist()]


@pytest.mark.parametrize("sizes", [[STORE], [1] * STORE, [100, 3, 100], [7] * 29])
@pytest.mark.parametrize("count", [1, 10, STORE, STORE + 5])
def test_candidates_are_the_head_of_a_sorted_row(queries, store, sizes, count):
    scores, indices = coarse_candidates(queries, iter(store.split(sizes)), count)
    expected = (queries.double() @ store.double().T)[torch.arange(QUERIES)[:, None], indices]
    assert indices.tolist() == best(queries.double() @ store.double().T, count)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 35, 1 << 20])
@pytest.mark.parametrize("sizes", [[STORE], [1] * STORE, [100, 3, 100]])
def test_of_equal_scores_the_lower_index_is_kept(sizes, piece, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.retrieval.two_stage.PIECE", piece)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randint(-1, 2, (QUERIES, 4), generator=generator).float()
    store = torch.randint(-1, 2, (STORE, 4), generator=generator).half()
    scores, indices = coarse_candidates(queries, store.split(sizes), 40)
    exact = queries @ store.float().T
    assert len(exact.unique()) < 10
    assert indices.tolist() == best(exact, 40)
    assert torch.equal(scores, exact.gather(1, indices))


def test_both_zeros_are_one_score():
    """Minus one times zero is minus zero."""
    _, indices = coarse_candidates(torch.tensor([[-1.0], [-1.0]]), torch.tensor([[0.0], [-0.0], [0.0]]), 3)
    assert indices.tolist() == [[0, 1, 2]] * 2


def test_a_bias_moves_both_stages(queries, store, levels):
    bias = 5 * torch.randn(3, STORE, generator=torch.Generator().manual_seed(4))
    coarse = queries @ store.T + bias[0]
    _, candidates = coarse_candidates(queries, store, 20, bias[0])
    assert candidates.tolist() == best(coarse, 20)
    scores, indices = two_stage_search(queries, store, lambda q, c: levels[:, q, c], 20, 4, bias)
    full = (levels + bias[:, None]).mean(0)
    for query, allowed in enumerate(best(coarse, 20)):
        expected = sorted(allowed, key=lambda j: -full[query, j].item())[:4]
        assert indices[query].tolist() == expected
        torch.testing.assert_close(scores[query], full[query, expected])


def test_with_all_as_candidates_it_is_the_full_ranking(queries, store, levels):
    scores, indices = two_stage_search(queries, store.split(50), lambda q, c: levels[:, q, c], STORE, STORE)
    assert indices.tolist() == best(levels.mean(0), STORE)
    assert torch.equal(scores, levels.mean(0).gather(1, indices))


def test_only_the_candidates_are_asked_for(queries, store):
    asked = []

    def fine(query, columns):
        asked.append((query, columns.tolist()))
        return torch.zeros(3, len(columns))

    _, indices = two_stage_search(queries, store, fine, candidates=12, top=3)
    assert asked == list(enumerate(best(queries @ store.T, 12)))
    assert indices.tolist() == [columns[:3] for _, columns in asked]  # equal at the end: the coarse order stays


def test_bad_input_is_refused(queries, store, levels):
    fine = levels[:, 0]
    with pytest.raises(ValueError, match="top=11 of candidates=10"):
        two_stage_search(queries, store, lambda q, c: fine[:, c], candidates=10, top=11)
    with pytest.raises(ValueError, match="count=0"):
        coarse_candidates(queries, store, 0)
    with pytest.raises(ValueError, match="store to search in is empty"):
        coarse_candidates(queries, [])
    with pytest.raises(ValueError, match="more candidates than the 200 of the bias"):
        coarse_candidates(queries, store, bias=torch.zeros(200))
    with pytest.raises(ValueError, match="203 candidates, the bias 210"):
        coarse_candidates(queries, store, bias=torch.zeros(210))
    store[150, 2] = torch.nan
    with pytest.raises(ValueError, match="candidates 100 to 199 is not a number"):
        coarse_candidates(queries, store.split(100))
    fine[1] = torch.nan
    with pytest.raises(ValueError, match="fine score of query 0"):
        two_stage_search(queries, store[:100], lambda q, c: fine[:, c])
