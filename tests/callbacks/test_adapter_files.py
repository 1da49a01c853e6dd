"""Folders of LoRA adapters, exchanged with the real `peft` library."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fulgurite.callbacks.adapter_files import read_peft_folder, write_peft_folder
from fulgurite.checkpoints import CheckpointError
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.lora import LoRA
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
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write(case, x, tmp_path):
    from peft import PeftModel

    model, bank = build(*CASES[case])
    with bank.use("a"):
        expected = model(x)
    write_peft_folder(bank, "a", tmp_path / "a", root="text")
    torch.manual_seed(0)
    wrapped = PeftModel.from_pretrained(Outer().text, tmp_path / "a")
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["norm"]}])
def test_we_read_what_peft_writes(options, x, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="q|v", **options)
    wrapped = get_peft_model(Outer().text, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
            assert "lora" in name or "norm" in name
    wrapped.save_pretrained(tmp_path)
    lora = partial(LoRA, rank=3, alpha=6.0, rslora="use_rslora" in options)
    replaced = [Placement(["norm"], Replace)] if "modules_to_save" in options else []
    model, bank = build(Placement(["q", "v"], lora), *replaced, seed=5)
    read_peft_folder(bank, "a", tmp_path, root="text")
    with bank.use("a"):
        torch.testing.assert_close(model(x), wrapped(x), rtol=1e-6, atol=1e-6)


def test_our_own_folder_comes_back_bit_for_bit(x, tmp_path):
    _, bank = build(*CASES["norm"])
    _, other = build(*CASES["norm"], seed=5)
    write_peft_folder(bank, "a", tmp_path / "a", base_model="tiny", root="text")
    read_peft_folder(other, "a", tmp_path / "a", base_model="tiny", root="text")
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters_of("a"), other.parameters_of("a")))


def test_a_folder_of_another_make_lists_all_differences_and_changes_nothing(tmp_path):
    write_peft_folder(build(*CASES["lora"])[1], "a", tmp_path / "a", base_model="large", root="text")
    _, bank = build(Placement(["q"], partial(LoRA, rank=2, alpha=6.0, rslora=True)))
    before = [p.clone() for p in bank.parameters_of("a")]
    with pytest.raises(ValueError) as error:
        read_peft_folder(bank, "a", tmp_path / "a", base_model="tiny", root="text")
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
def test_variants_of_lora_that_compute_something_else_are_refused(option, value, tmp_path):
    _, bank = build(*CASES["lora"])
    write_peft_folder(bank, "a", tmp_path / "a", root="text")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=f"{option}: file {value!r}"):
        read_peft_folder(bank, "a", tmp_path / "a", root="text")


def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    cases = [
        ([Placement(["q"], partial(Bottleneck, reduction=2))], "text", "not Bottleneck"),
        ([Placement(["norm"], Replace)], "text", "no LoRA"),
        ([Placement(["q"], LoRA)], "video", "outside root='video'"),
        ([Placement(["q"], partial(LoRA, rslora=True)), Placement(["v"], LoRA)], "text", "one rslora"),
    ]
    for placements, root, match in cases:
        with pytest.raises(ValueError, match=match):
            write_peft_folder(build(*placements)[1], "a", tmp_path / "a", root=root)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_missing_files_are_named(tmp_path):
    _, bank = build(*CASES["lora"])
    folder = Path(tmp_path / "a")
    write_peft_folder(bank, "a", folder, root="text")
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.{site}.lora_{part}.weight" for site in "qv" for part in "AB"
    }
    for name, junk in (("adapter_model.safetensors", b"\x08" + bytes(7)), ("adapter_config.json", b"{")):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(junk)
        with pytest.raises(CheckpointError, match=name):
            read_peft_folder(bank, "a", folder, root="text")
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"no {name}"):
            read_peft_folder(bank, "a", folder, root="text")
        (folder / name).write_bytes(good)
