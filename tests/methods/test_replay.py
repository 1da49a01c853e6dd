import pytest
import torch
from torch import nn

from fulgurite.methods.replay import Replay, same


class Counted(nn.Module):
    """x -> tanh(W x) + shift, or writes into its input first; knows how often it ran."""

    def __init__(self, writes=False):
        super().__init__()
        self.weight, self.writes, self.runs = nn.Parameter(torch.randn(3, 3, dtype=torch.float64)), writes, 0

    def forward(self, x, shift=0.0):
        self.runs += 1
        if self.writes:
            x += 1
        return torch.tanh(x @ self.weight) + shift


def chain(*writes):
    torch.manual_seed(0)
    parts = nn.ModuleList(Counted(each) for each in writes)
    x = torch.randn(2, 3, dtype=torch.float64)

    def run(shift=0.0):
        with torch.no_grad():
            hidden = x.clone()
            for part in parts:
                hidden = part(hidden, shift=shift)
            return hidden

    return parts, run, Replay({str(number): part for number, part in enumerate(parts)})


def runs(parts):
    found = [part.runs for part in parts]
    for part in parts:
        part.runs = 0
    return found


def test_only_what_follows_a_change_runs():
    parts, run, replay = chain(False, False, False, False)
    with replay.recording():
        clean = run()
    runs(parts)
    with replay.without([]):
        assert torch.equal(run(), clean)
    assert runs(parts) == [0, 0, 0, 0]
    with torch.no_grad():
        parts[2].weight.mul_(2)
    expected = run()
    runs(parts)
    with replay.without(["2"]):
        found = run()
    assert runs(parts) == [0, 0, 1, 1]
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)
    assert not any("forward" in part.__dict__ for part in parts)


def test_other_arguments_run_anew():
    parts, run, replay = chain(False, False)
    with replay.recording():
        run()
    runs(parts)
    with replay.without([]):
        changed = run(shift=1.0)
    assert runs(parts) == [1, 1]
    assert torch.equal(changed, run(shift=1.0))


def test_what_somebody_has_written_to_is_not_replayed():
    parts, run, replay = chain(False, True, False)
    expected = run()
    with replay.recording():
        assert torch.equal(run(), expected)
    runs(parts)
    for _ in range(2):
        with replay.without([]):
            assert torch.equal(run(), expected)
    _, run, replay = chain(False, False)
    whole = run() + 1
    with replay.recording():
        run().add_(1)
    for _ in range(2):
        with replay.without([]):
            assert torch.equal(run().add_(1), whole)


def test_a_forward_that_was_replaced_before_is_there_again_also_after_an_error():
    parts, _, replay = chain(False)
    own = parts[0].forward
    parts[0].forward = lambda x, shift: own(x, shift) + 1
    replaced = parts[0].__dict__["forward"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), replay.recording():
        parts[0](torch.zeros(1, 2, dtype=torch.float64), shift=0.0)
    assert parts[0].__dict__["forward"] is replaced


def test_caches_are_refused_by_name():
    class DynamicCache:
        pass

    parts, _, replay = chain(False)
    x = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="0 is given a DynamicCache: compute the loss"), replay.recording():
        parts[0](x, shift=DynamicCache())


def test_what_is_the_same():
    a, b = torch.tensor([1.0, float("nan")]), torch.tensor([1.0])
    assert same((a, {"x": [b, 1, None]}), (a, {"x": [b.clone(), 1, None]}))
    for one, other in ((b, b.double()), (a, a.clone()), (b, [1.0]), ({"x": 1}, {"y": 1}), ((1,), (1, 2)), (1, 2)):
        assert not same(one, other)
    assert not same(object(), object())
