"""Pruned weights stay exactly 0 through training, resuming and growing masks."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.keep_masks import GradualPruning, KeepMasks
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.checkpoints import load_tensors
from fulgurite.methods.pruning.gradual import cubic_sparsity, grown_mask
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


class Noisy(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)
        return loss


OPTIMIZERS["noisy"] = lambda p: Noisy(p, lr=1e-2, momentum=0.9)
FIRST, SECOND = "net.0.weight", "net.2.weight"


class Net(pl.LightningModule):
    def __init__(self, optimizer="adamw", pruned=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        nn.init.zeros_(self.net[4].weight)  # a fresh head
        if pruned:
            for layer in (self.net[0], self.net[2]):
                layer.weight.data[torch.rand(layer.weight.shape, generator=generator) < 0.5] = 0
        self.optimizer, self.losses, self.seen = optimizer, [], []

    def training_step(self, batch, index):
        self.seen.append({n: p.detach().clone() for n, p in self.named_parameters()})
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


class Saving(pl.Callback):
    """A callback that reads the weights right after each step of the optimizer, whatever else is to come."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def fit(root, module, callbacks, max_steps=8, ckpt_path=None, **options):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator))
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[DigestCheckpointIO()],
        callbacks=[*callbacks, PublishedCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **options,
    )
    trainer.fit(module, ResumableLoader(data, GlobalBatchSampler(32, 4)), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_and_the_others_train(optimizer, tmp_path):
    module, watcher = Net(optimizer), Saving()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(tmp_path, module, [watcher, KeepMasks()])
    for weights in watcher.after:
        for name in (FIRST, SECOND):
            assert torch.equal(weights[name] != 0, start[name] != 0)
    assert all((watcher.after[-1][name] != value).any() for name, value in start.items())
    assert module.net[4].weight.all()
    state = trainer.optimizers[0].state[module.net[0].weight]
    moments = [value for value in state.values() if value.shape == start[FIRST].shape]
    assert len(moments) == (2 if optimizer == "adamw" else 1)
    assert not any(moment[start[FIRST] == 0].any() for moment in moments)
    assert not load_tensors(tmp_path / "checkpoints" / "last")[FIRST][start[FIRST] == 0].any()


def test_without_it_they_do_not(tmp_path):
    module = Net()
    fit(tmp_path, module, [], max_steps=3)  # the head is 0 at first, and lets no gradient through
    assert module.net[0].weight.all()


def test_what_is_left_trains_as_if_the_pruned_inputs_were_not_there(tmp_path):
    """Gradients are masked before they are clipped: pruning whole input columns is training without these inputs."""
    modules = [Net(pruned=False), Net(pruned=False)]
    for module in modules:
        module.net[0].weight.data[:, 2:6] = 0
    fit(tmp_path / "a", modules[0], [KeepMasks("net.0.weight")], gradient_clip_val=0.05)

    class Blind(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, *args):
            batch[0][:, 2:6] = 0

    fit(tmp_path / "b", modules[1], [Blind()], gradient_clip_val=0.05)
    kept = [0, 1, 6, 7]
    # The pruned weights of the second decay from 0 and get no gradients, so they stay 0 too.
    torch.testing.assert_close(modules[0].net[0].weight[:, kept], modules[1].net[0].weight[:, kept])
    assert modules[0].losses == pytest.approx(modules[1].losses, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_masks_grow_as_the_schedule_says_and_never_shrink(accumulate, tmp_path):
    gradual = GradualPruning(0.75, end=6, start=1, every=2, initial=0.1)
    module, watcher = Net(pruned=False), Saving()
    trainer = fit(
        tmp_path, module, [KeepMasks("net.0.weight", gradual), watcher], 8, accumulate_grad_batches=accumulate
    )
    after = watcher.after[accumulate - 1 :: accumulate]
    sparsity = [1 - weights[FIRST].count_nonzero().item() / 128 for weights in after]
    at = {step: 0.75 + (0.1 - 0.75) * (1 - (step - 1) / 5) ** 3 for step in (1, 3, 5)} | {6: 0.75}
    expected, now = [], 0.0
    for step in range(1, 9):
        now = at.get(step, now)
        expected.append(round(now * 128) / 128)
    assert sparsity == expected
    for before, later in itertools.pairwise(after):
        assert not later[FIRST][before[FIRST] == 0].any()
    assert after[-1][SECOND].all()
    moment = trainer.optimizers[0].state[module.net[0].weight]["exp_avg"]
    assert not moment[module.net[0].weight == 0].any()
    assert trainer.callback_metrics["train/sparsity"] == 0.75


@pytest.mark.parametrize("gradual", [None, GradualPruning(0.75, end=7, every=3)])
def test_a_resumed_run_is_the_same_to_the_bit(gradual, tmp_path):
    whole = Net(pruned=gradual is None)
    fit(tmp_path / "whole", whole, [KeepMasks(gradual=gradual)])
    for step in (1, 4, 5):
        again = Net(pruned=gradual is None)
        path = tmp_path / "whole" / "checkpoints" / f"step={step}"
        fit(tmp_path / f"from {step}", again, [KeepMasks(gradual=gradual)], ckpt_path=path)
        own, other = whole.state_dict(), again.state_dict()
        assert all(own[name].numpy().tobytes() == other[name].numpy().tobytes() for name in own)


def test_two_at_once_and_twice_with_the_same_callback(tmp_path):
    callbacks = [KeepMasks("net.0.weight"), KeepMasks("net.2.weight", GradualPruning(0.5, end=2))]
    for number in range(2):
        module = Net()
        start = module.net[0].weight.detach() != 0
        trainer = fit(tmp_path / str(number), module, callbacks, 3)
        assert torch.equal(module.net[0].weight != 0, start)
        assert module.net[2].weight.count_nonzero() == 32
        trainer.optimizers[0].zero_grad()
        module.net[0].weight.grad = torch.ones(16, 8)
        trainer.optimizers[0].step()
        assert module.net[0].weight.all()  # once the fit is over, the optimizer is left alone


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="none of 3 trained tensors has entries that are 0"):
        fit(tmp_path, Net(pruned=False), [KeepMasks()])
    with pytest.raises(MisconfigurationException, match="'head' is the name of none of 6 trained tensors"):
        fit(tmp_path, Net(), [KeepMasks("head")])
    for wrong in ({"sparsity": 1.2}, {"sparsity": 0.5, "initial": 0.6}, {"sparsity": 0.5, "start": 4}, {"every": 0}):
        with pytest.raises(ValueError, match="gradual: "):
            GradualPruning(**{"sparsity": 0.5, "end": 4, **wrong})


def test_the_schedule_is_a_cube():
    found = [cubic_sparsity(step, 2, 6, 0.8) for step in range(9)]
    assert found == pytest.approx([0, 0, 0, 0.8 * (1 - 0.75**3), 0.8 * 0.875, 0.8 * (1 - 0.25**3), 0.8, 0.8, 0.8])


def test_kept_zeros_are_not_taken_for_pruned_ones():
    weight = torch.tensor([0.0, 0.0, 3.0, 0.0])
    mask = torch.tensor([True, False, True, False])
    assert grown_mask(weight, mask, 0.5).tolist() == mask.tolist()
    assert grown_mask(weight, mask, 0.75).tolist() == [False, False, True, False]
