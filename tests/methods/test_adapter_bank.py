"""Selection, hooks and bookkeeping of the bank."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.delta import WeightDelta
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.structure import ModelSpec

D = 8
SETS = ("a", "b", "c")


class Blocks(nn.Module):
    """Three residual blocks and a norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(D)
        self.dropout = nn.Dropout(dropout)
        points = {"block": (r"blocks\.\d+\.0", 3), "first": (r"blocks\.0\.0", 1), "whole": (r"blocks\.0", 1)}
        self.spec = ModelSpec(towers=(), points=points | {"norm": ("norm", 1), "absent": ("gate", 1)})
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return self.norm(x)


class Owner(nn.Module):
    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.model, self.bank = model, bank

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


PLACEMENTS = [
    Placement(["block"], partial(Bottleneck, reduction=2, init="official")),
    Placement(["norm"], Replace),
]


def build() -> Owner:
    torch.manual_seed(0)
    owner = Owner(model := Blocks(), AdapterBank(model, PLACEMENTS, SETS))
    for parameter in owner.bank.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return owner


@pytest.fixture
def owner() -> Owner:
    return build()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))


def outputs(owner: Owner, x: Tensor) -> dict[str | None, Tensor]:
    """What every selection by name gives."""
    result = {}
    for name in (*SETS, "live", None):
        with owner.bank.use(name):
            result[name] = owner(x).detach()
    return result


def test_blocks_nest_and_end_also_by_an_exception(owner, x):
    expected = outputs(owner, x)
    with owner.bank.use("a"):
        with owner.bank.use(None):
            assert torch.equal(owner(x), expected[None])
        assert torch.equal(owner(x), expected["a"])
        with pytest.raises(KeyError), owner.bank.use("b"):
            raise KeyError
        assert torch.equal(owner(x), expected["a"])
    assert torch.equal(owner(x), expected["live"])


def test_two_banks_do_not_see_each_others_selection(owner, x):
    other = build()
    expected = outputs(owner, x)
    with owner.bank.use("a"), other.bank.use("b"):
        assert torch.equal(owner(x), expected["a"])
        assert torch.equal(other(x), expected["b"])
    with owner.bank.use("a"):
        assert torch.equal(other(x), expected["live"])


def test_threads_keep_their_own_selection(owner, x):
    expected = outputs(owner, x)
    names = [SETS[i % 3] for i in range(6)]
    barrier = threading.Barrier(len(names))
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(10):
            with owner.bank.use(name):
                barrier.wait(timeout=30)
                if not torch.equal(owner(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_the_owner_calls_its_own_bank(owner, x, clone):
    expected = outputs(owner, x)
    twin = clone(owner)
    with torch.no_grad():
        for parameter in owner.bank.parameters():
            parameter.zero_()
    for name, output in expected.items():
        with twin.bank.use(name):
            assert torch.equal(twin(x), output)
    twin.bank.add("later")
    twin.bank.reset("live")
    assert torch.equal(twin.bank.sets["live"]["norm"].module.weight, twin.model.norm.weight)


def test_parameter_names_of_the_backbone_do_not_change(owner):
    assert owner.model.state_dict().keys() == Blocks().state_dict().keys()
    keys = set(owner.bank.state_dict())
    assert {"sets.a.blocks/1/0.down.weight", "sets.live.norm.module.bias"} <= keys
    assert len(keys) == 4 * (3 * 4 + 2)


def test_weights_only_stand_for_the_sets_that_are_named(owner, x):
    expected = outputs(owner, x)
    with owner.bank.use(torch.tensor([1, 1, 0, 0]), ["live", "b"]):
        mixed = owner(x)
    # Products of two examples may be rounded otherwise than those of four.
    torch.testing.assert_close(mixed[:2], expected["b"][:2])
    torch.testing.assert_close(mixed[2:], expected["live"][2:])


@pytest.mark.parametrize(
    ("selection", "sets", "error", "match"),
    [
        ("d", None, LookupError, r"no adapter set 'd'; there are \['a', 'b', 'c', 'live'\]"),
        (torch.ones(4, 2), None, ValueError, r"floats \(B, 3\) over \['a', 'b', 'c'\].*\(4, 2\)"),
        (torch.ones(4, 3, dtype=torch.long), None, ValueError, "torch.int64"),
        (torch.tensor([0, 1, 3, 0]), None, ValueError, "outside 0 to 2"),
        (torch.tensor([0.0, 1.0]), None, ValueError, "an index is long"),
        (torch.full((4, 3), float("nan")), None, ValueError, "not finite"),
        (torch.ones(4, 1), ["d"], LookupError, "no adapter set 'd'"),
        (torch.ones(5, 3), None, ValueError, r"'blocks\.0\.0' turns \(4, 3, 8\).*for 5 samples"),
        (torch.zeros(3, dtype=torch.long), None, ValueError, "for 3 samples"),
    ],
)
def test_a_selection_that_does_not_fit_is_one_clear_error(owner, x, selection, sets, error, match):
    with pytest.raises(error, match=match), owner.bank.use(selection, sets):
        owner(x)
    with owner.bank.use("a"):
        owner(x)


def test_samples_folded_into_the_first_dimension_are_an_error(owner, x):
    with pytest.raises(ValueError, match="must be the first dimension"), owner.bank.use(torch.ones(4, 3)):
        owner(x.flatten(0, 1))


@pytest.mark.parametrize(
    ("placements", "error", "match"),
    [
        ([Placement([], Bottleneck)], ValueError, "nothing to adapt"),
        ([Placement(["blok"], Bottleneck)], LookupError, "no place 'blok'"),
        ([Placement(["absent"], Bottleneck)], LookupError, "matches 0 modules, expected 1"),
        (
            [Placement(["block"], Bottleneck), Placement(["first"], WeightDelta)],
            ValueError,
            r"0 and 1 meet at 'blocks\.0\.0'",
        ),
        ([Placement(["whole"], Replace), Placement(["block"], Bottleneck)], ValueError, "is replaced"),
        ([Placement(["norm"], LoRA)], ValueError, "LoRA adapts nn.Linear layers, not LayerNorm"),
        ([Placement(["block"], partial(Bottleneck, reduction=9))], ValueError, "reduction=9"),
        ([Placement(["norm"], lambda site: nn.Identity())], ValueError, "no Adapter"),
    ],
)
def test_placements_that_cannot_be_are_refused(placements, error, match):
    with pytest.raises(error, match=match):
        AdapterBank(Blocks(), placements)


@pytest.mark.parametrize("name", ["", "x.y", "a", "live", "keys", "pop"])
def test_names_that_cannot_be_are_refused(owner, name):
    with pytest.raises(ValueError, match="cannot be called"):
        owner.bank.add(name)


def test_sets_come_and_go(owner):
    assert owner.bank.names == ["a", "b", "c", "live"]
    owner.bank.add("d")
    assert owner.bank.names == ["a", "b", "c", "live", "d"]
    owner.bank.remove("b")
    assert owner.bank.names == ["a", "c", "live", "d"]
    with pytest.raises(ValueError, match="cannot be removed"):
        owner.bank.remove("live")


def test_a_later_set_copies_the_pretrained_module_without_the_hooks_on_it(x):
    model = Blocks()
    bank = AdapterBank(model, [Placement(["norm"], Replace)])
    for parameter in bank.parameters_of("live"):
        parameter.data += 1.0
    bank.add("later")
    assert not bank.sets["later"]["norm"].module._forward_hooks
    with bank.use(None):
        bare = model(x)
    with bank.use("later"):
        assert torch.equal(model(x), bare)


def test_adapters_of_some_sites_are_filled_or_nothing_is(owner):
    weight = owner.bank.adapters_of("a")["blocks.1.0"].state_dict()
    owner.bank.load_sites("live", {"blocks.2.0": weight})
    live = owner.bank.adapters_of("live")
    assert all(torch.equal(value, weight[key]) for key, value in live["blocks.2.0"].state_dict().items())
    before = copy.deepcopy(owner.bank.state_dict())
    wrong = {"blocks.0.0": weight | {"down.weight": torch.zeros(2, D)}, "blocks.9": weight, "norm": {}}
    with pytest.raises(ValueError, match=r"(?s)4 adapters.*0\.0 down\.weight.*\(2, 8\).*\(4, 8\)") as error:
        owner.bank.load_sites("live", wrong)
    assert "blocks.9: no adapter there" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in owner.bank.state_dict().items())


def test_the_report_counts_what_trains(owner):
    report = owner.bank.report()
    live = sum(p.numel() for p in owner.bank.parameters() if p.requires_grad)
    assert report.num_parameters == live == 3 * (2 * D * D // 2 + D // 2 + D) + 2 * D
    assert report.num_bytes == 4 * live
    whole = live + sum(p.numel() for p in owner.model.parameters())
    assert report.share == live / whole
    owner.bank.add("later")
    assert owner.bank.report() == report
    assert str(report) == (
        f"{live} of {whole} parameters train ({live / whole:.2%}, 0.00 MB): "
        "Bottleneck at 3 sites (block), Replace at 1 site (norm)"
    )


def test_sites_get_keyword_inputs_too(owner, x):
    norm = owner.model.norm
    with owner.bank.use("a"):
        assert torch.equal(norm(input=x), norm(x))


def test_sharded_sets_copy_and_mix(owner, x, tmp_path):
    """FSDP2 with every adapter a unit: parameters are DTensors, mixing gathers them. One process stands for many."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    expected = outputs(owner, x)
    weights = torch.tensor([[0.5, 0.5, 0.0]] * 3 + [[0, 0, 1.0]])
    with torch.no_grad(), owner.bank.use(weights):
        mixed = owner(x)
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for adapters in owner.bank.sets.values():
            for adapter in adapters.values():
                fully_shard(adapter)
        with torch.no_grad(), owner.bank.use(weights):
            torch.testing.assert_close(owner(x), mixed)
        with pytest.raises(ValueError, match="no_grad"), owner.bank.use(weights):
            owner(x)
        owner.bank.copy("b", "live")
        assert torch.equal(owner(x).detach(), expected["b"])
    finally:
        destroy_process_group()
