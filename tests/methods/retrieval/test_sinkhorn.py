"""The Sinkhorn bias against the published linear form, its invariances, and banks that come in blocks."""

import pytest
import torch

from fulgurite.methods.retrieval.normalizers import pieces
from fulgurite.methods.retrieval.sinkhorn import Sinkhorn, sinkhorn_bias, streamed_sinkhorn_bias


def bank(rows=40, columns=7, seed=0, levels=None):
    shape = (rows, columns) if levels is None else (levels, rows, columns)
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_form(scores, iterations=4):
    """As published, in float64: the kernel, its column factors, and what is left of them."""
    kernel = (scores - scores.max()).double().exp()
    columns = 1 / kernel.sum(0)
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = 1 / (rows @ kernel)
    return columns.log().log_softmax(0).float(), rows[:, None] * kernel * columns if iterations else None


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_it_is_the_linear_form(iterations):
    expected, _ = linear_form(bank(), iterations)
    torch.testing.assert_close(sinkhorn_bias(bank(), iterations), expected, rtol=0, atol=2e-6)


def test_columns_of_the_scaled_kernel_sum_to_one():
    scores = bank().double()
    bias = sinkhorn_bias(scores).double()
    rows = -(scores + sinkhorn_bias(scores, 3).double()).logsumexp(1, keepdim=True)
    scaled = (scores + rows + bias).exp().sum(0)
    torch.testing.assert_close(scaled / scaled.mean(), torch.ones_like(scaled), rtol=1e-5, atol=0)


def test_a_constant_changes_nothing_and_a_column_is_evened_out():
    plain = sinkhorn_bias(bank())
    torch.testing.assert_close(sinkhorn_bias(bank() + 5), plain, rtol=0, atol=2e-6)
    shift = torch.linspace(-4, 4, 7)
    moved = sinkhorn_bias(bank() + shift) + shift - plain
    torch.testing.assert_close(moved, moved.mean().expand(7), rtol=0, atol=5e-6)


def test_equal_columns_have_a_uniform_bias():
    expected = torch.full((7,), 1 / 7).log()
    torch.testing.assert_close(sinkhorn_bias(bank(columns=1).expand(-1, 7)), expected, rtol=0, atol=1e-6)


def test_it_is_finite_where_the_linear_form_is_not():
    scores = 2e4 * torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) - 1e4
    scores[3] = -1e4
    scores[:, 2] = -1e4
    assert scores.dtype == torch.float32
    assert not linear_form(scores)[0].isfinite().all()
    assert sinkhorn_bias(scores).isfinite().all()


@pytest.mark.parametrize("sizes", [[41], [1] * 41, [7, 7, 7, 7, 7, 6], [40, 1], [13, 0, 28]])
def test_blocks_give_what_the_whole_bank_gives(sizes):
    scores = bank(rows=41, levels=3)
    found = streamed_sinkhorn_bias(lambda: scores.split(sizes, dim=1))
    for level, bias in zip(scores, found):
        torch.testing.assert_close(bias, linear_form(level)[0], rtol=0, atol=2e-6)


def test_a_block_is_worked_on_in_parts(monkeypatch):
    monkeypatch.setattr("fulgurite.methods.retrieval.normalizers.PIECE", 50)
    scores = bank(rows=41, levels=3)
    assert [len(piece[0]) for piece in pieces([scores])] == [2] * 20 + [1]
    assert torch.equal(torch.cat(list(pieces([scores])), 1), scores.double())


def test_every_pass_starts_anew():
    passes = []

    def blocks():
        passes.append(1)
        return iter([bank()[None]])

    Sinkhorn(iterations=2).fit(blocks)
    assert len(passes) == 3
    once = iter([bank()[None], bank()[None]])
    with pytest.raises(ValueError, match="gave 80 queries, a later one 0"):
        Sinkhorn().fit(lambda: once)
    numbers = iter([40, 30])
    with pytest.raises(ValueError, match="gave 40 queries, a later one 30"):
        Sinkhorn().fit(lambda: [bank()[None, : next(numbers)]])


def test_ranks_share_a_bank(on_ranks):
    scores = bank(rows=40, levels=2)
    parts = scores[:, :11], scores[:, 11:11], scores[:, 11:]
    found = on_ranks(3, lambda ranks: streamed_sinkhorn_bias(lambda: [parts[ranks.rank]], ranks=ranks))
    alone = on_ranks(2, lambda ranks: streamed_sinkhorn_bias(lambda: [scores][ranks.rank :], ranks=ranks))
    for each in (*found, *alone):
        torch.testing.assert_close(each, streamed_sinkhorn_bias(lambda: [scores]), rtol=0, atol=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="iterations=-1"):
        Sinkhorn(iterations=-1)
    with pytest.raises(ValueError, match="give it a bank"):
        Sinkhorn().fit(list)
    with pytest.raises(ValueError, match="levels, queries, candidates"):
        Sinkhorn().fit(lambda: [bank()])
