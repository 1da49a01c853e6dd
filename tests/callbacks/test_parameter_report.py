"""The table of what trains, by hand."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulgurite.callbacks.parameter_report import HEADER, ParameterReport, parameter_rows, state_sizes
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec

WIDE, NARROW = 400, 300
BACKBONE = 2 * WIDE * NARROW + WIDE + NARROW
K, HEAD = BACKBONE // 2, 3 * WIDE + 3
BOTTLENECKS = sum(n * (n // 2) * 2 + n + n // 2 for n in (WIDE, NARROW))


class Owner(nn.Module):
    """A mask and bottlenecks on a frozen backbone, a head that trains, and a set that does not."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDE, NARROW), nn.Linear(NARROW, WIDE)).requires_grad_(False)
        kinds = (partial(SparseMask, density=0.5, score="magnitude"), partial(Bottleneck, reduction=2))
        spec = ModelSpec(towers=(), points={"layers": ("[01]", 2)})
        self.bank = AdapterBank(self.backbone, [Placement(["layers"], kind) for kind in kinds], ["initial"], spec=spec)
        self.head = nn.Linear(WIDE, 3)


@pytest.fixture
def owner():
    return Owner()


def adam(owner):
    return torch.optim.AdamW([*owner.bank.parameters_of("live"), *owner.head.parameters()])


def test_rows_are_placements_other_parts_and_all(owner):
    rows, caption = parameter_rows(owner, [adam(owner)])
    counts, total = [K, BOTTLENECKS, HEAD, K + BOTTLENECKS + HEAD], BACKBONE + K + BOTTLENECKS + HEAD
    stored = [8 * K, 4 * BOTTLENECKS, 4 * HEAD]  # a mask stores an index of 4 bytes with each value
    assert [row[0] for row in rows] == ["SparseMask at layers", "Bottleneck at layers", "head", "all"]
    assert [row[1] for row in rows] == ["2", "2", "", ""]
    assert [row[2] for row in rows] == [f"{n:,}" for n in counts]
    assert [row[3] for row in rows] == [f"{n / total:.2%}" for n in counts]
    assert [row[4] for row in rows] == [f"{n / 1e6:.2f}" for n in (*stored, sum(stored))]
    assert [row[5] for row in rows] == [f"{8 * n / 1e6:.2f}" for n in counts]  # two moments of float32
    assert caption == (f"sets of this size: live, which trains, and frozen initial; model: {total:,} parameters")
    owner.head.requires_grad_(False)
    assert [row[0] for row in parameter_rows(owner, [])[0]] == ["SparseMask at layers", "Bottleneck at layers", "all"]


@pytest.mark.parametrize(
    ("kind", "moments"), [(torch.optim.AdamW, 2), (torch.optim.SGD, 0), (partial(torch.optim.SGD, momentum=0.9), 1)]
)
def test_an_optimizer_keeps_its_moments_in_the_type_of_each_parameter(kind, moments):
    parameters = [nn.Parameter(torch.zeros(5, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert state_sizes(kind(parameters, lr=0.1)) == {parameters[0]: 40 * moments, parameters[1]: 20 * moments}
    assert all(not p.any() and p.grad is None for p in parameters)


def test_one_process_prints_it(owner, capsys):
    for first in (False, True):
        trainer = SimpleNamespace(is_global_zero=first, optimizers=[adam(owner)])
        ParameterReport().on_fit_start(trainer, owner)
        printed = capsys.readouterr().out
        assert all((title in printed) == first for title in [*HEADER, "SparseMask at layers"])
