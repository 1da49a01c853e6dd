"""Every normaliser against plain loops, and which of them let a query be scored alone."""

import math

import pytest
import torch

from fulgurite.methods.retrieval.dual_softmax import DualSoftmax
from fulgurite.methods.retrieval.normalizers import NoNormalizer
from fulgurite.methods.retrieval.query_bank import QueryBank
from fulgurite.methods.retrieval.sinkhorn import Sinkhorn, sinkhorn_bias

SINGLE = [NoNormalizer(), Sinkhorn(), QueryBank(), QueryBank(beta=1.5, dynamic=False)]
ALL = [*SINGLE, DualSoftmax(), DualSoftmax(temperature=3.0)]
LEVELS, BANK, QUERIES, CANDIDATES = 3, 23, 9, 6


def named(normalizer):
    return type(normalizer).__name__ + "".join(f"-{value}" for value in vars(normalizer).values())


@pytest.fixture
def scores():
    return 4 * torch.randn(LEVELS, QUERIES, CANDIDATES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def bank():
    return 4 * torch.randn(LEVELS, BANK, CANDIDATES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expected(normalizer, scores, bank):
    """Plain loops over levels, queries and candidates."""
    out = torch.zeros(QUERIES, CANDIDATES, dtype=torch.float64)
    for level in range(LEVELS):
        fitted = scores[level] if normalizer.mode == "transductive" else bank[level]
        rows = fitted.tolist()
        hubs = {max(range(CANDIDATES), key=row.__getitem__) for row in rows}
        sinkhorn = sinkhorn_bias(fitted)
        for q, row in enumerate(scores[level].tolist()):
            for j, score in enumerate(row):
                if isinstance(normalizer, Sinkhorn):
                    score += sinkhorn[j].item()
                elif isinstance(normalizer, DualSoftmax):
                    t = normalizer.temperature
                    score *= math.exp(score / t) / sum(math.exp(each[j] / t) for each in rows)
                elif isinstance(normalizer, QueryBank):
                    beta = normalizer.beta
                    if not normalizer.dynamic or max(range(CANDIDATES), key=row.__getitem__) in hubs:
                        share = math.exp(beta * score) / sum(math.exp(beta * each[j]) for each in rows)
                        score = math.log(share) / beta
                out[q, j] += score / LEVELS
    return out


@pytest.mark.parametrize("normalizer", ALL, ids=named)
def test_it_is_what_plain_loops_give(normalizer, scores, bank):
    fitted = normalizer.fit(lambda: (scores if normalizer.mode == "transductive" else bank).split(5, dim=1))
    torch.testing.assert_close(
        normalizer.apply(scores, fitted), expected(normalizer, scores, bank), rtol=1e-5, atol=1e-5
    )


def test_dynamic_rows_are_of_both_kinds(scores, bank):
    """Otherwise the test above compares less than it says."""
    bank[:, :, 0] += 10
    bank[:, :, 1] += 8
    fitted = QueryBank().fit(lambda: [bank])
    drawn = fitted["hubs"].gather(1, scores.argmax(2))
    assert drawn.any()
    assert not drawn.all()
    found = QueryBank().apply(scores, fitted)
    torch.testing.assert_close(found, expected(QueryBank(), scores, bank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalizer", ALL, ids=named)
def test_a_query_is_scored_alone_where_the_mode_says_so(normalizer, scores, bank):
    alone, others = scores[:, 2:3], scores.clone()
    others[:, 3:] += 2
    assert normalizer.mode == ("single-query" if normalizer in SINGLE else "transductive")
    found = []
    for test in (alone, scores, others):
        fitted = normalizer.fit(lambda test=test: [test if normalizer.mode == "transductive" else bank])
        row = 0 if test is alone else 2
        found.append(normalizer.apply(test, fitted)[row])
    same = [torch.equal(found[0], each) for each in found[1:]]
    assert same == [normalizer.mode == "single-query"] * 2


@pytest.mark.parametrize("normalizer", ALL, ids=named)
def test_a_bias_is_all_there_is_or_refused(normalizer, scores, bank):
    fitted = normalizer.fit(lambda: [bank])
    if isinstance(normalizer, DualSoftmax) or getattr(normalizer, "dynamic", False):
        with pytest.raises(ValueError, match="choose NoNormalizer, Sinkhorn, or QueryBank with dynamic: false"):
            normalizer.bias(fitted)
        return
    bias = normalizer.bias(fitted)
    found = scores.mean(0) if bias is None else (scores + bias[:, None]).mean(0)
    torch.testing.assert_close(normalizer.apply(scores, fitted), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalizer", ALL, ids=named)
def test_ranks_share_the_queries(normalizer, bank, on_ranks):
    parts = bank[:, :4], bank[:, 4:]
    whole = normalizer.fit(lambda: [bank])
    for found in on_ranks(2, lambda ranks: normalizer.fit(lambda: [parts[ranks.rank]], ranks)):
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_nothing_is_asked_of_a_bank_that_is_not_needed():
    assert NoNormalizer().fit(lambda: pytest.fail("not needed")) == {}


@pytest.mark.parametrize("normalizer", [Sinkhorn(), DualSoftmax(), QueryBank()], ids=named)
def test_no_queries_are_refused(normalizer):
    with pytest.raises(ValueError, match="no queries to fit on"):
        normalizer.fit(list)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="temperature=0 of DualSoftmax"):
        DualSoftmax(temperature=0)
    with pytest.raises(ValueError, match="beta=-1 of QueryBank"):
        QueryBank(beta=-1)
