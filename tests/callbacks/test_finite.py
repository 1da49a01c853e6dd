"""What is not finite is named and stops the run, or is left out without a trace."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.finite import FiniteCheck, NotFiniteError
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.checkpoints import load_tensors


class Net(LightningModule):
    """Two layers; ``bad`` maps a batch to what its loss is multiplied with."""

    def __init__(self, bad=None, fault="loss"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.bad, self.fault, self.seen = bad or {}, fault, []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        loss = self.second(self.first(batch["x"]).tanh()).square().mean()
        factor = self.bad.get(batch_idx)
        if factor is not None and self.fault == "gradient":
            self.second.weight.register_hook(lambda g: g * factor) if not self.second.weight._backward_hooks else None
        elif factor is not None:
            loss = loss * factor
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def loader(batches=6):
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=generator), "id": f"s{i}"} for i in range(2 * batches)]
    return DataLoader(rows, batch_size=2)


def trainer(tmp_path, *callbacks, **options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=1,
        default_root_dir=tmp_path,
        plugins=[DigestCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": bool(callbacks[1:]), **options},
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_named(factor, tmp_path):
    module = Net({3: factor})
    saved = PublishedCheckpoint(str(tmp_path / "c"), every_n_train_steps=1, save_top_k=1)
    with pytest.raises(NotFiniteError, match=r"step 3[\s\S]*\['s6', 's7'\][\s\S]*first gradient: first.weight"):
        trainer(tmp_path, FiniteCheck(), saved).fit(module, loader())
    assert module.seen == [0, 1, 2, 3]
    (kept,) = (tmp_path / "c").glob("*step=3")
    assert all(t.isfinite().all() for t in load_tensors(kept).values())
    assert all(torch.equal(load_tensors(kept)[n], p) for n, p in module.named_parameters())


def test_an_infinite_gradient_of_a_finite_loss_is_named(tmp_path):
    module = Net({2: math.inf}, fault="gradient")
    with pytest.raises(NotFiniteError, match=r"step 2[\s\S]*first gradient: second.weight\n  samples.*'s4', 's5'"):
        trainer(tmp_path, FiniteCheck()).fit(module, loader())


def test_a_weight_that_comes_in_as_nan_is_named_and_cannot_be_skipped(tmp_path):
    module = Net()
    with torch.no_grad():
        module.second.bias[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"step 0[\s\S]*first weight: second.bias"):
        trainer(tmp_path, FiniteCheck("skip")).fit(module, loader())


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    class Spoil(FiniteCheck):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                pl_module.first.weight.data[0, 0] = math.inf

    saved = PublishedCheckpoint(str(tmp_path / "c"), every_n_train_steps=1, save_top_k=1)
    with pytest.raises(NotFiniteError, match=r"step 2: the trained weights are not finite, the first is first.weight"):
        trainer(tmp_path, Spoil(), saved).fit(Net(), loader())
    assert {p.name.rpartition("=")[2] for p in (tmp_path / "c").iterdir()} == {"1", "last"}


def test_a_step_left_out_changes_nothing_but_the_count(tmp_path):
    """As if the optimizer had not been called: weights, moments and their step count."""
    plain, skipping = Net(), Net({3: math.nan})
    without = [batch for i, batch in enumerate(loader()) if i != 3]
    check = FiniteCheck("skip")
    a, b = trainer(tmp_path), trainer(tmp_path, check)
    a.fit(plain, DataLoader(without, batch_size=None))
    b.fit(skipping, loader())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), skipping.parameters()))
    for p, q in zip(plain.parameters(), skipping.parameters()):
        for key, value in a.optimizers[0].state[p].items():
            assert torch.equal(value, b.optimizers[0].state[q][key]), key
    assert check.state_dict() == {"skipped": 1, "in_a_row": 0}
    assert skipping.seen == list(range(6))


def test_an_accumulation_window_names_the_batch_that_spoilt_it(tmp_path):
    module = Net({2: math.nan})
    with pytest.raises(NotFiniteError, match=r"loss nan on \['s4', 's5'\]"):
        trainer(tmp_path, FiniteCheck(), accumulate_grad_batches=3).fit(module, loader())


def test_too_many_in_a_row_stop_the_run(tmp_path):
    module = Net(dict.fromkeys(range(1, 6), math.nan))
    with pytest.raises(NotFiniteError, match="step 3"):
        trainer(tmp_path, FiniteCheck("skip", patience=2)).fit(module, loader())


def test_a_patience_below_one_is_refused():
    with pytest.raises(ValueError, match="patience=0"):
        FiniteCheck("skip", 0)
