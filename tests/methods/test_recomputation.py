import contextvars
import copy
import pickle

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.recomputation import recompute, recomputed, recomputes, without_recomputation
from fulgurite.methods.statistics.fisher import FisherStatistics

FACTOR = contextvars.ContextVar("factor", default=1.0)


class Block(nn.Module):
    """x + drop(W_2 tanh(c W_1 x)) with a factor c that it looks up."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.runs = nn.Linear(4, 64), nn.Linear(64, 4), 0

    def forward(self, x, *, scale=1.0):
        self.runs += 1
        inside = self.second(torch.tanh(FACTOR.get() * self.first(x)))
        return x + nn.functional.dropout(inside, 0.5, self.training) * scale


def stack(blocks=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def saved(run):
    """Numbers that are kept for the backward pass by ``run``, besides parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = run()
    return out, sum(t.numel() for t in kept if not isinstance(t, nn.Parameter))


def gradients(model, x):
    torch.manual_seed(1)
    token = FACTOR.set(3.0)
    loss = model(x).square().mean()
    FACTOR.reset(token)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def the_same(module):
    return module


@pytest.mark.parametrize("again", [the_same, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_a_block_drops_and_looks_up_is_the_same_in_the_backward_pass(again):
    model, x = stack(), torch.randn(5, 4)
    loss, expected = gradients(model, x)
    recompute(model)
    own = again(model)
    found, others = gradients(own, x)
    assert all(recomputes(block) for block in own)
    assert torch.equal(found, loss)
    assert all(map(torch.equal, others, expected))
    assert [block.runs for block in own] == [3] * 3  # once before, and twice now
    assert [block.runs for block in model] == [3 if own is model else 1] * 3


def test_of_a_block_nothing_is_kept_but_its_input():
    model, x = stack(), torch.randn(5, 4)
    sizes = {}
    for name in ("kept", "recomputed"):
        _, sizes[name] = saved(lambda: model(x))
        recompute(model)
    # Per block: input, inner states (64 wide) twice, factors of dropout; of a recomputed one what enters it.
    assert sizes["kept"] >= 3 * 5 * 64 * 2
    assert sizes["recomputed"] <= 3 * 5 * 4


def test_where_no_backward_pass_can_follow_a_block_runs_as_ever():
    model, x = stack(1), torch.randn(5, 4)
    recompute(model)
    with torch.no_grad():
        model(x)
    with without_recomputation():
        _, size = saved(lambda: model(x))
    assert size >= 5 * 64 * 2
    assert model[0].runs == 2


def test_a_function_gives_what_it_gives_nested_as_it_is():
    weight = torch.randn(4, requires_grad=True)
    one, other = recomputed(lambda x, times: (x * weight, {"twice": x * times}), torch.ones(4), times=2)
    assert other["twice"].tolist() == [2.0] * 4
    one.sum().backward()
    assert weight.grad.tolist() == [1.0] * 4


def test_a_replaced_block_trains_a_copy_of_its_own():
    (block,) = stack(1)
    recompute([block])
    adapter, x = Replace(block), torch.randn(5, 4)
    adapter(x, None).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.module.parameters())
    assert adapter.module.runs == 1
    assert block.runs == 0


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_example_by_example_keep_their_states(vectorize):
    sums = []
    for again in (False, True):
        model = stack(2).eval()
        recompute(model if again else ())

        def losses(own, x):
            return own(x).square().mean(-1)

        statistic = FisherStatistics(model, losses, kind="empirical", vectorize=vectorize)
        torch.manual_seed(2)
        statistic.update(torch.randn(5, 4), torch.arange(5))
        sums.append(statistic.sums)
    for name, expected in sums[0].items():
        assert torch.equal(sums[1][name], expected), name
