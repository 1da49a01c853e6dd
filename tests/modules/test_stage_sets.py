"""What modules with a set per stage share, without data."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules import stage_sets
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.stage_sets import StageSets
from fulgurite.samples import Stage

STAGES = (Stage("a", ("x", "y"), 2, 5), Stage("b", ("z",), 3, 5))


class Backbone(FrozenBackbone):
    source, fingerprint = "none", "0"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.spec = ModelSpec(towers=(), points={"layer": ("layer", 1)})
        self.freeze()

    def collator(self, stage):
        return None


class Streamed(StageSets):
    """In some epoch of the stages above."""

    def __init__(self, stage=0, epoch=0, limit=None):
        super().__init__(Backbone(), [Placement(["layer"], partial(Bottleneck, reduction=1))])
        self.stages, self.stage = STAGES, stage
        self.trainer = SimpleNamespace(current_epoch=epoch, limit_train_batches=limit)

    def build(self, info, stages):
        """Nothing."""


def test_there_is_a_set_for_every_stage_and_one_before():
    assert Streamed().set_names(STAGES) == ["initial", "a", "b"]
    for name in ("a", "initial", "live"):
        with pytest.raises(ValueError, match="stage names must differ and not be initial or live"):
            Streamed().set_names([STAGES[0], Stage(name, (), 1, 1)])


@pytest.mark.parametrize("start_from", ["previous", "initial"])
def test_a_stage_starts_from_the_one_before_or_from_the_beginning(start_from):
    module = Streamed()
    module.start_from = start_from
    name = "live" if start_from == "previous" else "initial"
    expected = [p.detach().clone() for p in module.bank.parameters_of(name)]
    module.begin_stage()
    found = module.bank.parameters_of("live")
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def test_a_stage_begins_behind_the_epochs_of_those_before():
    assert [Streamed().first_epoch(stage) for stage in (0, 1, 2)] == [0, 2, 5]
    found = {(stage, epoch) for stage in (0, 1) for epoch in range(5) if Streamed(stage, epoch).in_first_epoch}
    assert found == {(0, 0), (1, 2)}


@pytest.mark.parametrize(("epoch", "limit", "said"), [(2, 3, 1), (2, 5, 0), (2, 1.0, 0), (3, 3, 0)])
def test_it_is_said_where_routers_learn_from_part_of_the_data(epoch, limit, said, monkeypatch):
    messages = []
    monkeypatch.setattr(AdaptedModule, "on_train_epoch_start", lambda module: None)
    monkeypatch.setattr(stage_sets, "rank_zero_info", messages.append)
    Streamed(1, epoch, limit).on_train_epoch_start()
    assert messages == ["b: the router learns from 3 of 5 batches (limit_train_batches 3)"] * said


def test_routers_learn_what_counts_on_all_processes():
    module, seen = Streamed(stage=1), []
    module.all_gather = lambda tensor: torch.stack([tensor, tensor])  # the other process has the same
    router = SimpleNamespace(update=lambda features, name: seen.append((features, name)))
    features = torch.arange(6.0).view(3, 2)
    module.teach([router], [features, features[:, :1]], torch.tensor([True, False, True]))
    (((first, second), name),) = seen
    assert name == "b"
    assert torch.equal(first, features[[0, 2, 0, 2]])
    assert torch.equal(second, first[:, :1])


def test_weights_have_the_names_of_their_sets():
    assert [Streamed(stage).columns() for stage in (-1, 0, 1)] == [
        ["initial", "a", "b"],
        ["initial", "live", "b"],
        ["initial", "a", "live"],
    ]
    assert Streamed(0).columns("best") == ["initial", "best", "b"]
    assert Streamed().named_weights([1 / 3, 0.0, 2 / 3]) == {"initial": 0.333333, "b": 0.666667}


def test_every_sample_has_the_stage_of_its_domain():
    assert Streamed().own_stages([1, None, 2], torch.tensor([2, 1, 0, -1])).tolist() == [2, 0, 1, 0]
