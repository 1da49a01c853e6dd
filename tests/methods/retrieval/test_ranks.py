"""Counted ranks against a full sort in numpy, ties, texts that share a video, and blocks."""

import numpy as np
import pytest
import torch

from fulgurite.methods.retrieval.ranks import RankCounts, owner_of_texts, ranks_both_ways, ranks_of_counts

CAPTIONS = torch.tensor([3, 1, 4, 2, 2, 5, 1])
RULES = ("optimistic", "mean", "pessimistic")


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def sorted_ranks(scores):
    """Of the diagonal in each row, by sorting all of it."""
    order = np.sort(-scores, axis=1)
    places = order - np.diag(-scores)[:, None]
    assert ((places == 0).sum(1) == 1).all()
    return np.where(places == 0)[1] + 1.0


def plain_ranks(scores, owner, ties):
    """Loops; the score of a video for another is the best of the other's texts."""

    def rank(scores, right):
        above = sum(score > scores[right] for score in scores)
        equal = sum(score == scores[right] for score in scores) - 1
        return 1 + above + {"optimistic": 0, "mean": 0.5, "pessimistic": 1}[ties] * equal

    rows, num_videos = scores.tolist(), scores.shape[1]
    texts = [rank(row, own) for row, own in zip(rows, owner)]
    best = [[max(r[v] for r, o in zip(rows, owner) if o == u) for u in range(num_videos)] for v in range(num_videos)]
    return texts, [rank(column, v) for v, column in enumerate(best)]


def test_ranks_are_the_places_in_a_sorted_row():
    scores = matrix(60, 60)
    texts, videos = ranks_both_ways(scores)
    assert texts.tolist() == sorted_ranks(scores.numpy()).tolist()
    assert videos.tolist() == sorted_ranks(scores.numpy().T).tolist()


def test_the_identity_is_found_first():
    assert [ranks.tolist() for ranks in ranks_both_ways(torch.eye(5))] == [[1.0] * 5] * 2


@pytest.mark.parametrize("ties", RULES)
@pytest.mark.parametrize("levels", [3, 10**6])
def test_ties_and_texts_that_share_a_video(ties, levels):
    owner = owner_of_texts(CAPTIONS)
    scores = (matrix(18, 7) * levels).round() / levels
    assert (levels > 3) == (len(scores.unique()) == scores.numel())
    found = ranks_both_ways(scores, owner, ties)
    assert [ranks.tolist() for ranks in found] == [*plain_ranks(scores, owner.tolist(), ties)]


@pytest.mark.parametrize(("ties", "rank"), zip(RULES, (1, 5, 9)))
def test_equal_scores_for_all_are_a_guess(ties, rank):
    assert [ranks.tolist() for ranks in ranks_both_ways(torch.zeros(9, 9), ties=ties)] == [[rank] * 9] * 2


def test_one_text_per_video_needs_no_owner():
    scores = matrix(9, 9)
    with_owner = ranks_both_ways(scores, owner_of_texts(torch.ones(9, dtype=torch.long)))
    assert all(map(torch.equal, with_owner, ranks_both_ways(scores)))


@pytest.mark.parametrize("piece", [1, 20, 1 << 19])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_blocks_add_up_in_any_order(order, piece, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.retrieval.ranks.PIECE", piece)
    owner, scores = owner_of_texts(CAPTIONS), matrix(18, 7).mul(4).round()
    counts = RankCounts(owner, scores.gather(1, owner[:, None])[:, 0])
    bounds = [(0, 4), (4, 12), (12, 18)]
    for first, last in (bounds[index] for index in order):
        counts.add(first, scores[first:last])
    assert [counts.texts[1].unique().tolist(), counts.videos[1].unique().tolist()] == [[1], [1]]
    found = [ranks_of_counts(each).tolist() for each in (counts.texts, counts.videos)]
    assert found == [*plain_ranks(scores, owner.tolist(), "mean")]


def test_directions_can_have_scores_of_their_own():
    for_texts, for_videos = matrix(18, 7, 1), matrix(18, 7, 2)
    owner = owner_of_texts(CAPTIONS)
    counts = RankCounts(owner, for_videos.gather(1, owner[:, None])[:, 0])
    counts.add_texts(0, for_texts)
    counts.add_videos(0, for_videos)
    assert ranks_of_counts(counts.texts).tolist() == plain_ranks(for_texts, owner.tolist(), "mean")[0]
    assert ranks_of_counts(counts.videos).tolist() == plain_ranks(for_videos, owner.tolist(), "mean")[1]


def test_the_own_pair_never_counts_against_itself():
    """Its score in a block may differ by rounding from the one that was computed alone."""
    counts = RankCounts(torch.arange(3), torch.tensor([1.0, 1.0, 1.0]) - 1e-6, ties="pessimistic")
    counts.add_videos(0, torch.eye(3))
    assert ranks_of_counts(counts.videos).tolist() == [1, 1, 1]


def test_coarse_numbers_are_compared_as_they_are():
    scores = matrix(12, 12).bfloat16()
    found = [ranks.tolist() for ranks in ranks_both_ways(scores)]
    assert found == [*plain_ranks(scores.float(), range(12), "mean")]


def test_what_is_no_number_helps_nobody():
    scores = torch.eye(4)
    scores[0, 1] = torch.nan
    assert [ranks.tolist() for ranks in ranks_both_ways(scores, ties="optimistic")] == [[2, 1, 1, 1], [1, 2, 1, 1]]
    scores[2, 2] = torch.nan
    with pytest.raises(ValueError, match="text 2 scores NaN"):
        ranks_both_ways(scores)


def test_bad_input_is_refused():
    own = torch.zeros(4)
    with pytest.raises(ValueError, match="choose one of optimistic, mean, pessimistic"):
        RankCounts(torch.arange(4), own, ties="first")
    for owner in ([0, 2, 2, 3], [0, 1, 0, 1], [1, 1, 2, 2]):
        with pytest.raises(ValueError, match="one after the other, none left out"):
            RankCounts(torch.tensor(owner), own)
    with pytest.raises(ValueError, match="one entry per text"):
        RankCounts(torch.arange(3), own)
    counts = RankCounts(torch.tensor([0, 1, 1, 2]), own)
    with pytest.raises(ValueError, match=r"scores \(2, 3\) from text 3 on: there are 4 texts, 3 videos"):
        counts.add(3, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="texts 1 to 1 divides the texts of a video, which are 1 to 2"):
        counts.add(1, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="do not fit"):
        ranks_both_ways(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="do not fit"):
        ranks_both_ways(torch.zeros(4, 3), torch.tensor([0, 1, 1, 1]))
