"""Sets in peft's layout, against the `peft` library itself and against W + s B A by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.peft_format import from_peft, to_peft
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.structure import ModelSpec

D = 6


class Inner(nn.Module):
    """Has a layer ``q``, and another whose name ends so, which must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(D, D), nn.Linear(D, D)
        self.other = nn.ModuleDict({"q": nn.Linear(D, D)})
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v(self.q(x).tanh()) + self.other["q"](x))


class Outer(nn.Module):
    """The backbone around the model that peft wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Inner()
        points = {"q": (r"text\.q", 1), "v": (r"text\.v", 1), "norm": (r"text\.norm", 1)}
        self.spec = ModelSpec(towers=(), points=points)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(x)


def build(*placements: Placement, seed: int = 0) -> tuple[Outer, AdapterBank]:
    torch.manual_seed(0)
    model = Outer()
    bank = AdapterBank(model, placements, ["a"])
    torch.manual_seed(seed)
    for parameter in bank.parameters_of("a"):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model, bank


CASES = {
    "lora": [Placement(["q", "v"], partial(LoRA, rank=3, alpha=6.0))],
    "rslora": [Placement(["q", "v"], partial(LoRA, rank=3, alpha=6.0, rslora=True))],
    "ranks": [
        Placement(["q"], partial(LoRA, rank=2, alpha=6.0)),
        Placement(["v"], partial(LoRA, rank=4, alpha=1.0)),
    ],
    "norm": [Placement(["q"], partial(LoRA, rank=2)), Placement(["norm"], Replace)],
    "ia3": [Placement(["q", "v"], IA3)],
    "ia3_input": [Placement(["q"], IA3), Placement(["v"], IA3Input), Placement(["norm"], Replace)],
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))


def in_peft(config, tensors):
    """The model that peft makes of a configuration and tensors, around the same backbone."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    torch.manual_seed(0)
    wrapped = get_peft_model(Outer().text, PeftConfig.from_peft_type(**config))
    result = set_peft_model_state_dict(wrapped, dict(tensors))
    assert result.unexpected_keys == []
    return wrapped.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_what_we_give(case, x):
    model, bank = build(*CASES[case])
    with bank.use("a"):
        expected = model(x)
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(in_peft(*to_peft(bank, "a", root="text"))(x), expected, rtol=1e-6, atol=1e-6)


def test_the_tensors_are_the_factors_of_the_change_of_the_weight(x):
    model, bank = build(*CASES["ranks"])
    with bank.use("a"):
        expected = model(x)
    config, tensors = to_peft(bank, "a", "tiny", root="text")
    torch.manual_seed(0)
    plain = Outer()
    for site, scale in (("q", 6 / 2), ("v", 1 / 4)):
        up, down = (tensors[f"base_model.model.{site}.lora_{part}.weight"] for part in "BA")
        plain.text.get_submodule(site).weight += scale * up @ down
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
    assert config["base_model_name_or_path"] == "tiny"
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^v": 4}, {"^v": 1.0})


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["norm"]}])
def test_we_compute_the_same_from_what_peft_gives(options, x):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    settings = LoraConfig(r=3, lora_alpha=6, target_modules="q|v", **options)
    wrapped = get_peft_model(Outer().text, settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    lora = partial(LoRA, rank=3, alpha=6.0, rslora="use_rslora" in options)
    replaced = [Placement(["norm"], Replace)] if "modules_to_save" in options else []
    model, bank = build(Placement(["q", "v"], lora), *replaced, seed=5)
    from_peft(bank, "a", settings.to_dict(), get_peft_model_state_dict(wrapped), root="text")
    with bank.use("a"):
        torch.testing.assert_close(model(x), wrapped(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("feed_forward", [[], ["v"]])
def test_we_compute_the_same_from_the_factors_that_peft_gives(feed_forward, x):
    from peft import IA3Config, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    settings = IA3Config(target_modules="q|v", feedforward_modules=feed_forward)
    wrapped = get_peft_model(Outer().text, settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model, bank = build(Placement(["q"], IA3), Placement(["v"], IA3Input if feed_forward else IA3), seed=5)
    from_peft(bank, "a", settings.to_dict(), get_peft_model_state_dict(wrapped), root="text")
    with bank.use("a"):
        torch.testing.assert_close(model(x), wrapped(x), rtol=1e-6, atol=1e-6)
    _, wrong = build(Placement(["q"], IA3), Placement(["v"], IA3 if feed_forward else IA3Input))
    with pytest.raises(ValueError, match=r"v\.ia3_l: file \(\d, \d\), here"):
        from_peft(wrong, "a", settings.to_dict(), get_peft_model_state_dict(wrapped), root="text")


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_for_bit(case):
    _, bank = build(*CASES[case])
    _, other = build(*CASES[case], seed=5)
    from_peft(other, "a", *to_peft(bank, "a", "tiny", root="text"), base_model="tiny", root="text")
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters_of("a"), other.parameters_of("a")))


def test_another_make_lists_all_differences_and_changes_nothing():
    config, tensors = to_peft(build(*CASES["lora"])[1], "a", "large", root="text")
    _, bank = build(Placement(["q"], partial(LoRA, rank=2, alpha=6.0, rslora=True)))
    before = [p.clone() for p in bank.parameters_of("a")]
    with pytest.raises(ValueError) as error:
        from_peft(bank, "a", config, tensors, base_model="tiny", root="text")
    lines = str(error.value).splitlines()
    assert lines[0] == "7 things in peft's files do not fit the set 'a':"
    assert [line.strip() for line in lines[1:]] == [
        "base model: file 'large', here 'tiny'",
        "q rank: file 3, here 2",
        "q rslora: file False, here True",
        "q.lora_A.weight: file (3, 6), here (2, 6)",
        "q.lora_B.weight: file (6, 3), here (6, 2)",
        "v.lora_A.weight: file (3, 6), here missing",
        "v.lora_B.weight: file (6, 3), here missing",
    ]
    assert all(torch.equal(p, q) for p, q in zip(before, bank.parameters_of("a")))


@pytest.mark.parametrize(("option", "value"), [("use_dora", True), ("bias", "all"), ("peft_type", "IA3")])
def test_variants_of_lora_that_compute_something_else_are_refused(option, value):
    _, bank = build(*CASES["lora"])
    config, tensors = to_peft(bank, "a", root="text")
    with pytest.raises(ValueError, match=f"{option}: file {value!r}"):
        from_peft(bank, "a", config | {option: value}, tensors, root="text")


@pytest.mark.parametrize(
    ("placements", "root", "match"),
    [
        ([Placement(["q"], partial(Bottleneck, reduction=2))], "text", "not Bottleneck"),
        ([Placement(["norm"], Replace)], "text", "no LoRA or IA3"),
        ([Placement(["q"], LoRA), Placement(["v"], IA3)], "text", r"one kind.*'IA3', 'LoRA'"),
        ([Placement(["q"], LoRA), Placement(["q"], LoRA)], "text", r"once at a layer.*'q', 'q@1'"),
        ([Placement(["q"], LoRA)], "video", "outside root='video'"),
        ([Placement(["q"], partial(LoRA, rslora=True)), Placement(["v"], LoRA)], "text", "one rslora"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(placements, root, match):
    with pytest.raises(ValueError, match=match):
        to_peft(build(*placements)[1], "a", root=root)
