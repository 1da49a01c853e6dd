"""Recalls and ranks against numpy, by group, and from two processes with unequally many texts."""

import json

import numpy as np
import pytest
import torch

from fulgurite.methods.retrieval.ranks import RankCounts, owner_of_texts, ranks_both_ways
from fulgurite.metrics.retrieval_recall import DIRECTIONS, RetrievalRecall, rank_figures

CAPTIONS = torch.tensor([3, 1, 4, 2, 2, 5, 1, 2, 2, 3, 1])
GROUPS = ("indoors", "outdoors", "nobody's")


def case():
    """Scores with ties, the owner of every text, and the group of its video."""
    owner = owner_of_texts(CAPTIONS)
    scores = torch.randn(len(owner), len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    scores += 2 * torch.nn.functional.one_hot(owner)
    return scores.mul(2).round(), owner, owner % 2


def plain_figures(ranks):
    ranks = np.asarray(ranks)
    figures = {f"R@{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)}
    return {**figures, "MdR": np.median(ranks), "MnR": np.mean(ranks)}


def values(figures):
    return {key: value.item() for key, value in figures.items()}


SCRIPT = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_retrieval_recall import GROUPS, case
from fulgurite.methods.retrieval.ranks import RankCounts
from fulgurite.metrics.retrieval_recall import RetrievalRecall

dist.init_process_group("gloo")
scores, owner, group = case()
own = scores.gather(1, owner[:, None])[:, 0]
told = []
for split in (4, 0):
    first, last = ((0, split), (split, len(owner)))[dist.get_rank()]
    counts, metric = RankCounts(owner, own), RetrievalRecall(groups=GROUPS)
    if last > first:
        counts.add(first, scores[first:last])
    known = torch.full_like(group, -1)
    known[first:last] = group[first:last]
    metric.update(counts, group=known)
    told.append({{key: value.item() for key, value in metric.compute().items()}})
print(json.dumps(told))
"""


def test_figures_are_those_of_numpy():
    scores, owner, group = case()
    metric = RetrievalRecall(groups=GROUPS)
    metric.update(scores, owner, group)
    found = values(metric.compute())
    video_groups = [g % 2 for g in range(len(CAPTIONS))]
    for direction, ranks, groups in zip(DIRECTIONS, ranks_both_ways(scores, owner), (group.tolist(), video_groups)):
        expected = {f"{direction}/{key}": value for key, value in plain_figures(ranks).items()}
        for index, name in enumerate(GROUPS[:2]):
            own = [rank for rank, g in zip(ranks.tolist(), groups) if g == index]
            expected |= {f"{direction}/{key}/{name}": value for key, value in plain_figures(own).items()}
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-12), key
        assert np.isnan(found[f"{direction}/R@1/nobody's"])
    assert len(found) == 2 * 5 * 4


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_median_is_that_of_numpy(count):
    ranks = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(count))
    assert values(rank_figures(ranks)) == pytest.approx(plain_figures(ranks), rel=1e-12)


def test_the_identity_is_perfect():
    metric = RetrievalRecall()
    metric.update(torch.eye(12))
    expected = {"R@1": 100, "R@5": 100, "R@10": 100, "MdR": 1, "MnR": 1}
    assert values(metric.compute()) == {f"{d}/{key}": value for d in DIRECTIONS for key, value in expected.items()}


def test_scores_that_are_all_equal_are_a_guess():
    metric = RetrievalRecall(recalls=[1, 6])
    metric.update(torch.zeros(12, 12))
    expected = {"R@1": 0, "R@6": 0, "MdR": 6.5, "MnR": 6.5}
    assert values(metric.compute()) == {f"{d}/{key}": value for d in DIRECTIONS for key, value in expected.items()}
    metric = RetrievalRecall(recalls=[1], ties="optimistic")
    metric.update(torch.zeros(12, 12))
    assert metric.compute()["video_to_text/R@1"] == 100


def test_blocks_give_what_the_matrix_gives():
    scores, owner, group = case()
    whole, streamed = RetrievalRecall(groups=GROUPS), RetrievalRecall(groups=GROUPS)
    whole.update(scores, owner, group)
    counts = RankCounts(owner, scores.gather(1, owner[:, None])[:, 0])
    for first, last in ((8, 26), (0, 4), (4, 8)):
        counts.add(first, scores[first:last])
    streamed.update(counts, group=group)
    assert values(whole.compute()) == pytest.approx(values(streamed.compute()), rel=0, nan_ok=True)


def test_two_processes_have_the_figures_of_one(pair, tmp_path):
    """The first has 4 of 26 texts, and then none."""
    script = tmp_path / "recall.py"
    script.write_text(SCRIPT.format(folder=str(__file__).rpartition("/")[0]))
    scores, owner, group = case()
    metric = RetrievalRecall(groups=GROUPS)
    metric.update(scores, owner, group)
    expected = pytest.approx(values(metric.compute()), rel=0, abs=0, nan_ok=True)
    for text in pair.run(script):
        assert json.loads(text.splitlines()[-1]) == [expected] * 2


def test_a_metric_can_be_used_again_after_reset():
    metric = RetrievalRecall()
    metric.update(torch.eye(3))
    with pytest.raises(ValueError, match="reset between sets"):
        metric.update(torch.eye(4))
    metric.reset()
    metric.update(torch.eye(4).flip(0))
    assert metric.compute()["text_to_video/R@1"] == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"recalls=\[1, 0\]"):
        RetrievalRecall(recalls=[1, 0])
    metric = RetrievalRecall(groups=GROUPS)
    with pytest.raises(ValueError, match=r"group \(3,\) up to 3 for 3 texts"):
        metric.update(torch.eye(3), group=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"group \(2,\) up to 1 for 3 texts"):
        metric.update(torch.eye(3), group=torch.tensor([0, 1]))
    counts = RankCounts(torch.arange(3), torch.ones(3))
    counts.add(1, torch.eye(3)[1:])
    metric.update(counts)
    with pytest.raises(ValueError, match="1 of 3 texts were not counted once, as text 0, counted 0 times"):
        metric.compute()
    counts.add(0, torch.eye(3)[:1])
    counts.add_videos(0, torch.eye(3)[:1])
    metric.reset()
    metric.update(counts)
    with pytest.raises(ValueError, match="1 of 3 videos were not counted once, as video 0, counted 2 times"):
        metric.compute()
