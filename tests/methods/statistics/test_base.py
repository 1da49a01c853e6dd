"""What every statistic does: sums over processes, and a state that is taken up where it was left."""

import copy

import pytest
import torch
from torch import nn

from fulgurite.methods.statistics.fisher import FisherStatistics
from fulgurite.methods.statistics.gram import GramStatistics


def gram():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    statistic = GramStatistics(model, "0|2", 2)

    def feed(x):
        with statistic.watch():
            model(x)

    return statistic, feed


def fisher(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    statistic = FisherStatistics(model, lambda model, x: model(x), **options)
    return statistic, statistic.update


def drawn():
    return fisher(max_exact=1, generator=torch.Generator().manual_seed(5))


KINDS = pytest.mark.parametrize("make", [gram, fisher, drawn])


@pytest.fixture
def x():
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def same(a, b, tolerance=0.0):
    assert list(a) == list(b)
    assert all((a[n] - b[n]).abs().max() <= tolerance * b[n].abs().max() for n in b)


@pytest.mark.parametrize("make", [gram, fisher])
def test_processes_add_up_to_one(make, x):
    """Three processes, of which one has no data and one has more; the sum is simulated tensor by tensor."""
    alone, feed = make()
    feed(x)
    ranks = [make() for _ in range(3)]
    ranks[0][1](x[:3])
    ranks[1][1](x[3:])
    order, asked = [], []
    for statistic, _ in ranks:
        seen = []
        copy.deepcopy(statistic).reduce(lambda tensor, seen=seen: seen.append(tensor.clone()) or tensor)
        order.append(seen)
    for statistic, _ in ranks:
        place = iter(range(len(order[0])))
        statistic.reduce(lambda tensor, place=place: torch.stack([o[i] for i in [next(place)] for o in order]).sum(0))
        asked.append(statistic)
    for statistic in asked:
        same(statistic.means(), alone.means(), 1e-6)
        with pytest.raises(ValueError, match="already summed over processes"):
            statistic.reduce(lambda tensor: tensor)
    with pytest.raises(ValueError, match="already summed over processes"):
        ranks[0][1](x)
    ranks[0][0].reset()
    ranks[0][1](x)
    same(ranks[0][0].means(), alone.means())


@KINDS
def test_a_stored_state_goes_on_to_the_bit(make, x, tmp_path):
    whole, feed = make()
    for part in x.split(4):
        feed(part)
    first, feed = make()
    feed(x[:4])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second, feed = make()
    feed(x)  # what is loaded replaces what was there
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for part in x[4:].split(4):
        feed(part)
    same(second.means(), whole.means())
    second.reduce(lambda tensor: tensor)
    third, _ = make()
    third.load_state_dict(second.state_dict())
    with pytest.raises(ValueError, match="already summed"):
        third.check_open()


@KINDS
def test_a_state_is_a_copy(make, x):
    statistic, feed = make()
    feed(x)
    state = statistic.state_dict()
    before = copy.deepcopy(state)
    feed(x)
    other, feed = make()
    other.load_state_dict(state)
    feed(x)
    for kind in ("sums", "counts"):
        same(state[kind], before[kind])


def test_a_state_of_something_else_is_refused(x):
    statistic, feed = fisher()
    feed(x)
    state = statistic.state_dict()
    with pytest.raises(ValueError, match="moment: stored 'square', here 'absolute'"):
        fisher(moment="absolute")[0].load_state_dict(state)
    state["sums"]["0.bias"] = torch.zeros(5)
    state["sums"]["other"] = state["sums"].pop("2.bias")
    target, _ = fisher()
    with pytest.raises(ValueError, match="FisherStatistics is of something else") as error:
        target.load_state_dict(state)
    for text in ("other: only stored", "2.bias: not stored", "0.bias: stored (5,), here (4,)"):
        assert text in str(error.value)
    assert not any(t.any() for t in target.sums.values())
