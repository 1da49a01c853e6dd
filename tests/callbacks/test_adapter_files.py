"""Folders of LoRA adapters: read by the real `peft` library, and checked byte by byte by us."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fulgurite.callbacks.adapter_files import read_peft_folder, write_peft_folder
from fulgurite.checkpoints import CheckpointError, DamagedError, MismatchError, audit, read_manifest
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.peft_format import to_peft
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.structure import ModelSpec

D = 6
FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE = {"source": "tiny", "digest": "xxh3_128:0a"}


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.spec = ModelSpec(towers=(), points={"q": (r"q", 1), "v": (r"v", 1), "norm": (r"norm", 1)})
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v(self.q(x).tanh()))


def build(seed: int = 0) -> tuple[Backbone, AdapterBank]:
    model = Backbone()
    placements = [
        Placement(["q"], partial(LoRA, rank=2, alpha=6.0)),
        Placement(["v"], partial(LoRA, rank=3, alpha=1.5)),
        Placement(["norm"], Replace),
    ]
    bank = AdapterBank(model, placements, ["a"])
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters_of("a"):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, bank


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def written(tmp_path):
    """A bank, and the folder of its set."""
    _, bank = build()
    write_peft_folder(tmp_path / "a", *to_peft(bank, "a", "tiny"), base=BASE, facts={"set": "a"})
    return bank, tmp_path / "a"


def test_peft_reads_the_folder_past_its_manifest(x, written):
    from peft import PeftConfig, PeftModel

    bank, folder = written
    model, again = build(seed=9)
    again.load_sites("a", {site: adapter.state_dict() for site, adapter in bank.adapters_of("a").items()})
    with again.use("a"):
        expected = model(x)
    assert PeftConfig.from_pretrained(folder).base_model_name_or_path == "tiny"
    wrapped = PeftModel.from_pretrained(Backbone(), folder)
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == [*FILES, "manifest.json"]


def test_the_manifest_covers_both_files_and_names_the_base(written):
    _, folder = written
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.base, manifest.facts["set"]) == ("delta", BASE, "a")
    assert {(state.path.name, state.state) for state in audit(folder)} == {
        (name, "good") for name in (*FILES, "manifest.json")
    }


def test_our_own_folder_comes_back_bit_for_bit(written):
    bank, folder = written
    _, other = build(seed=5)
    read_peft_folder(other, "a", folder, base_model="tiny", base_digest=BASE["digest"])
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters_of("a"), other.parameters_of("a")))


def test_a_folder_of_peft_is_read_without_a_manifest(x, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(Backbone(), LoraConfig(r=2, lora_alpha=6, target_modules="q", modules_to_save=["norm"]))
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    model = Backbone()
    bank = AdapterBank(model, [Placement(["q"], partial(LoRA, rank=2, alpha=6.0)), Placement(["norm"], Replace)], ["a"])
    read_peft_folder(bank, "a", tmp_path)
    with bank.use("a"):
        torch.testing.assert_close(model(x), wrapped(x), rtol=1e-6, atol=1e-6)


def test_another_backbone_is_refused_by_its_digest(written):
    _, folder = written
    with pytest.raises(MismatchError, match=r"delta over tiny with digest xxh3_128:0a.*xxh3_128:0b"):
        read_peft_folder(build()[1], "a", folder, base_digest="xxh3_128:0b")


def test_every_flipped_bit_is_found_and_nothing_is_changed(written):
    _, folder = written
    _, bank = build(seed=5)
    before = [p.clone() for p in bank.parameters_of("a")]
    generator = random.Random(0)
    for name in (*FILES, "manifest.json"):
        sound = (folder / name).read_bytes()
        for place in generator.sample(range(len(sound)), 60):
            changed = bytearray(sound)
            changed[place] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name):
                read_peft_folder(bank, "a", folder)
        (folder / name).write_bytes(sound)
    assert all(torch.equal(p, q) for p, q in zip(before, bank.parameters_of("a")))
    read_peft_folder(bank, "a", folder)


def test_damaged_and_missing_files_are_named(written):
    bank, folder = written
    (folder / "manifest.json").unlink()
    for name, junk in zip(FILES, (b"{", b"\x08" + bytes(7))):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(junk)
        with pytest.raises(DamagedError, match=name):
            read_peft_folder(bank, "a", folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"no {name}"):
            read_peft_folder(bank, "a", folder)
        (folder / name).write_bytes(good)


def tiny_t5() -> nn.Module:
    """Two tiny stacks of the library's own T5, with the public places of its layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    settings = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(settings).eval().requires_grad_(False)
    points = {name: (rf".*Attention\.{name}", 3) for name in "qkv"} | {"wo": (r".*\.wo", 2)}
    model.spec = ModelSpec(towers=(), points=points)
    return model


LIBRARY_CASES = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3}, [Placement(["q", "v"], partial(LoRA, rank=2, alpha=3))]),
    "rslora": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 3, "use_rslora": True},
        [Placement(["q", "v"], partial(LoRA, rank=2, alpha=3, rslora=True))],
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
        [Placement(["k", "v"], IA3), Placement(["wo"], IA3Input)],
    ),
}


@pytest.mark.parametrize("case", LIBRARY_CASES)
def test_folders_of_peft_for_a_model_of_transformers_both_ways(case, tmp_path):
    import peft

    config, options, placements = LIBRARY_CASES[case]
    tokens = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(8).view(2, 4)}
    wrapped = peft.get_peft_model(tiny_t5(), getattr(peft, config)(**options))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn_like(parameter)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    expected = wrapped(**tokens).logits

    model = tiny_t5()
    bank = AdapterBank(model, placements, ["a"])
    assert not torch.allclose(model(**tokens).logits, expected, atol=1e-3)
    read_peft_folder(bank, "a", tmp_path / "theirs")
    with bank.use("a"):
        torch.testing.assert_close(model(**tokens).logits, expected, rtol=1e-5, atol=1e-5)

    write_peft_folder(tmp_path / "ours", *to_peft(bank, "a", "tiny"), base=BASE)
    again = peft.PeftModel.from_pretrained(tiny_t5(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**tokens).logits, expected, rtol=1e-5, atol=1e-5)
