"""Masks and ladders that start from training samples, against gradients taken one sample after the other."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.data_start import examples, importance_of, scores_of_mask, start_from_data
from fulgurite.samples import Sample, sample_fields
from fulgurite.samples.dataset import drawn_samples

SAMPLES = [Sample(id=str(i), domain="d", features={"x": torch.tensor([i, 1.0, -i])}) for i in range(9)]


class Loaded:
    """Training samples in batches of two, the last of which is filled with a repeat."""

    def samples(self, split):
        return {"train": SAMPLES}[split]

    def loader(self, split, samples, name):
        for batch in (samples[:2], samples[2:4], samples[4:]):
            counted = torch.tensor([True] * len(batch) + [False])
            batch = [*batch, SAMPLES[0]]
            yield {**sample_fields(batch), "x": torch.stack([s.features["x"] for s in batch]), "counted": counted}


TRAINER = SimpleNamespace(
    datamodule=Loaded(),
    global_rank=0,
    world_size=1,
    precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
    strategy=SimpleNamespace(batch_to_device=lambda batch, device: batch, root_device=torch.device("cpu")),
)


ADAPTER = partial(Bottleneck, reduction=1)


class Module(LightningModule):
    """A linear classifier of which class a sample's number is, with an adapter that changes what it says."""

    def __init__(self, kind=ADAPTER):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 2)).requires_grad_(False)
        spec = ModelSpec(towers=(), points={"layer": ("0", 1)})
        self.bank = AdapterBank(self.backbone, [Placement(["layer"], kind)], ["kept"], spec=spec)

    def example_inputs(self, batch):
        numbers = torch.tensor([int(name) for name in batch["id"]])
        pictures = dict.fromkeys(("features", "picture", "pixels"), batch["x"])
        return {"text": batch["x"], "targets": numbers % 2, **pictures}

    def example_losses(self, inputs):
        self.seen = set(inputs)
        return F.cross_entropy(self.example_logits(inputs), inputs["targets"], reduction="none")

    def example_logits(self, inputs):
        return self.backbone(inputs["text"])


def slow(backbone, samples, score):
    """Sums over samples, and of expectations over classes, of squared or absolute gradients."""
    plain = nn.Sequential(nn.Linear(3, 2))
    plain.load_state_dict(backbone.state_dict())
    total = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for sample in samples:
        surprise = -plain(sample.features["x"]).log_softmax(-1)
        pairs = [(1.0, surprise[int(sample.id) % 2])]
        for weight, loss in pairs if "label" in score else [((-s).exp().item(), s) for s in surprise]:
            for name, g in zip(total, torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True)):
                total[name] += weight * (g.abs() if "absolute" in score else g.square())
    return total


@pytest.mark.parametrize("score", ["label", "label_absolute", "expect"])
def test_scores_are_those_of_the_samples_that_the_mask_asks_for(score):
    module = Module(partial(SparseMask, density=0.5, score=score, samples=5, seed=3))
    (mask,) = module.bank.adapters_of("live").values()
    found = scores_of_mask(TRAINER, module, mask)
    for name, expected in slow(module.backbone, drawn_samples(SAMPLES, 5, 3), score).items():
        torch.testing.assert_close(found[name], expected.double())


@pytest.mark.parametrize("ladder_inputs", ["text", "text_and_vision"])
def test_importance_is_that_of_the_backbone_alone_and_of_what_it_sees(ladder_inputs):
    module = Module()
    for parameter in module.bank.parameters_of("live"):
        nn.init.ones_(parameter)
    found = importance_of(TRAINER, module, SimpleNamespace(samples=5, seed=3, ladder_inputs=ladder_inputs))
    for name, expected in slow(module.backbone, drawn_samples(SAMPLES, 5, 3), "label").items():
        torch.testing.assert_close(found[name], expected.double())
    pictures = {"features", "picture", "pixels"}
    assert module.seen == {"text", "targets"} | (pictures if ladder_inputs == "text_and_vision" else set())


@pytest.mark.parametrize("count", [4, 5, 99])
def test_every_drawn_sample_comes_once_with_its_number(count):
    drawn, rows = drawn_samples(SAMPLES, count, 1), []
    for inputs in examples(TRAINER, Module(), count, 1):
        rows += zip(inputs["number"].tolist(), inputs["text"][:, 0].tolist())
    assert rows == [(number, float(sample.id)) for number, sample in enumerate(drawn)]


@pytest.mark.parametrize("kind", [ADAPTER, partial(SparseMask, density=0.5, score="magnitude")])
def test_what_starts_without_data_stays_as_it_is(kind):
    module = Module(kind)
    before = {name: tensor.clone() for name, tensor in module.bank.state_dict().items()}
    start_from_data(SimpleNamespace(strategy=TRAINER.strategy), module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.bank.state_dict().items())


def test_a_ladder_by_magnitude_is_pruned_from_the_token_table_to_the_last_norm_without_data(kit):
    points = ["embedded", "encoder_block", "decoder_block", "read_out"]
    module = kit.module(adapters=lambda: [Placement(points, partial(LadderSide, reduction=2))])
    for norm in (module.backbone.language.encoder.final_layer_norm, module.backbone.language.decoder.final_layer_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    (expected,) = (
        kit.module(adapters=lambda: [Placement(points, partial(LadderSide, reduction=2))])
        .bank.adapters_of("live")
        .values()
    )
    copy_pruned(expected, module.backbone, module.backbone.spec)
    start_from_data(SimpleNamespace(strategy=TRAINER.strategy), module)
    for name in module.bank.names:
        (ladder,) = module.bank.adapters_of(name).values()
        for key, tensor in ladder.stacks.state_dict().items():
            if ".blocks." in key or ".norm." in key:
                assert torch.equal(tensor, expected.stacks.state_dict()[key]), key
    assert not any((stack.norm.weight == 1).any() for stack in ladder.stacks)


def test_all_sets_start_from_the_same_scores():
    module = Module(partial(SparseMask, density=0.5, samples=5, seed=3))
    start_from_data(TRAINER, module)
    (live,), (kept,) = (module.bank.adapters_of(name).values() for name in ("live", "kept"))
    expected = torch.cat([t.flatten() for t in slow(module.backbone, drawn_samples(SAMPLES, 5, 3), "label").values()])
    assert live.positions.tolist() == expected.topk(4).indices.sort().values.tolist()
    assert torch.equal(live.positions, kept.positions)
