"""Renewal of sparse masks while they train."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.callbacks.mask_refresh import MaskRefresh, carry_state, masks_of
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.mask_choice import chosen_positions, common_entries
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.adapted import AdaptedModule


class Backbone(FrozenBackbone):
    source, fingerprint = "none", "0"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
        for parameter in self.layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.spec = ModelSpec(towers=(), points={"parameters": (r"layers\.[02]", 2)})
        self.refreshed = 0
        self.freeze()

    def collator(self, stage):
        return None

    def refresh(self):
        self.refreshed += 1
        self.seen = self.layers(torch.ones(1, 4))


class Module(AdaptedModule):
    """Without data facts and stages."""

    def __init__(self, *placements):
        super().__init__(Backbone(), list(placements))

    def build(self, info, stages):
        pass

    def setup(self, stage):
        pass

    on_fit_start = on_train_start = on_train_epoch_start = on_train_epoch_end = lambda self: None

    def training_step(self, batch, index):
        return self.backbone.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.trained().values(), lr=0.1)


class Scored(Module):
    calls = 0

    def mask_scores(self, mask):
        """The last entries of every tensor."""
        self.calls += 1
        return {name: torch.arange(size).float() for name, size in mask.sizes.items()}


def masked(score="magnitude"):
    return Placement(["parameters"], partial(SparseMask, density=0.5, score=score))


class Watch(pl.Callback):
    """What the step that renews leaves behind, by the optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        (mask,) = masks_of(pl_module)
        (optimizer,) = trainer.optimizers
        state = {name: t.clone() for name, t in optimizer.state[mask.values].items() if t.dim()}
        seen = {"positions": mask.positions.clone(), "values": mask.values.detach().clone(), **state}
        self.seen.setdefault(trainer.global_step, []).append(seen)


def fit(module, *callbacks, steps=4, accumulate=1):
    data = DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return trainer


def with_start(module):
    """The module, its mask's positions given, and the backbone's weights."""
    (mask,) = masks_of(module)
    if not mask.is_scored:
        mask.set_scores(dict.fromkeys(mask.sizes, torch.zeros(())) | {n: torch.zeros(s) for n, s in mask.sizes.items()})
    return mask, [p.clone() for p in module.backbone.parameters()]


@pytest.mark.parametrize("dropped", ["keep", "restore"])
def test_kept_entries_go_on_and_new_ones_start_anew(dropped):
    module = Scored(masked("label"))
    mask, start = with_start(module)
    before, after = Watch(), Watch()
    trainer = fit(module, before, MaskRefresh(2, dropped=dropped, last_step=2), after, accumulate=2)
    old, new = (watch.seen[2][0] for watch in (before, after))
    expected = chosen_positions(module.mask_scores(mask), mask.sizes, len(mask.positions))
    assert torch.equal(new["positions"], expected)
    assert not torch.equal(old["positions"], expected)
    of_old, of_new = common_entries(old["positions"], new["positions"])
    fresh = torch.ones(len(expected), dtype=torch.bool)
    fresh[of_new] = False
    for name in ("values", "exp_avg", "exp_avg_sq"):
        assert torch.equal(new[name][of_new], old[name][of_old])
        assert name == "values" or not new[name][fresh].any()
    flat = torch.cat([p.flatten() for p in start])
    assert torch.equal(new["values"][fresh], flat[expected.long()][fresh])
    now = torch.cat([p.flatten() for p in module.backbone.parameters()])
    if dropped == "keep":
        gone = torch.ones(len(expected), dtype=torch.bool)
        gone[of_old] = False
        flat[old["positions"].long()[gone]] = old["values"][gone]
    assert torch.equal(now, flat)
    assert (module.self_contained, module.backbone.refreshed) == ((True, 1) if dropped == "keep" else (False, 0))
    with module.bank.use(None):
        assert dropped == "restore" or torch.equal(module.backbone.seen, module.backbone.layers(torch.ones(1, 4)))
    assert module.calls == 2  # one of them is this test's
    assert trainer.callback_metrics["train/mask_renewed"] == fresh.float().mean()


def test_scores_without_data_need_no_module():
    module = Module(masked("random"))
    positions = masks_of(module)[0].positions.clone()
    fit(module, MaskRefresh(1))
    assert not torch.equal(masks_of(module)[0].positions, positions)


def test_what_cannot_be_renewed_is_refused():
    with pytest.raises(MisconfigurationException, match="no adapter of Module is a SparseMask"):
        fit(Module(Placement(["parameters"], partial(Bottleneck, reduction=2))), MaskRefresh(2))
    with pytest.raises(MisconfigurationException, match='has no mask_scores to compute score="label"'):
        fit(Module(masked("label")), MaskRefresh(2))
    with pytest.raises(ValueError, match="every_n_steps=0"):
        MaskRefresh(0)


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.Adam, amsgrad=True)])
def test_all_state_of_the_shape_of_the_values_is_carried(kind):
    values = nn.Parameter(torch.zeros(5))
    optimizer = kind([values], lr=0.1)
    values.grad = torch.arange(1.0, 6.0)
    optimizer.step()
    before = {name: t.clone() for name, t in optimizer.state[values].items() if torch.is_tensor(t) and t.dim()}
    carry_state(optimizer, values, torch.tensor([1, 4]), torch.tensor([0, 2]))
    for name, tensor in before.items():
        expected = torch.zeros(5)
        expected[0], expected[2] = tensor[1], tensor[4]
        assert torch.equal(optimizer.state[values][name], expected)
