"""What holds for every kind of adapter, and for a backbone that trains itself."""

import pytest
import torch
from adapter_kinds import KINDS, TASKS
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulgurite.callbacks.rng import RandomStates

every_kind = pytest.mark.parametrize("kind", KINDS)


def mixed_tasks(kit):
    """Two batches of four samples in an epoch, of both tasks."""
    return kit.toys(TASKS, {**kit.SIZES, "train": 4}, batches="mixed")


@every_kind
def test_bf16_trains_float32_tensors_alone_and_a_resume_is_exact(kind, kit, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3, auto_insert_metric_name=False)
    options = {"limit_val_batches": 0, "enable_checkpointing": True, "max_epochs": 3, "precision": "bf16-mixed"}
    runs = []
    for callbacks, checkpoint in (([saver], None), ([], tmp_path / "3.ckpt")):
        model = kit.module(adapters=KINDS[kind], optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-2))
        steps = kit.Steps()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = kit.trainer_of(tmp_path, callbacks=[*callbacks, RandomStates(), steps], **options)
        trainer.fit(model, datamodule=mixed_tasks(kit), ckpt_path=checkpoint)
        runs.append((model, steps.losses, trainer.optimizers[0].state_dict()["state"]))
    (whole, losses, states), (resumed, last_losses, last_states) = runs
    assert losses[3:] == last_losses
    assert states.keys() == last_states.keys()
    for number, state in states.items():
        for name, value in state.items():
            assert torch.equal(value, last_states[number][name]), name
    moved = 0
    trained = {id(p) for p in whole.trained().values()}
    for (name, parameter), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert parameter.dtype == torch.float32
        if id(parameter) in trained:
            moved += not torch.equal(parameter, before[name])
        else:
            assert parameter.grad is None, name
            assert name.startswith("bank.sets.initial") or torch.equal(parameter, before[name]), name
    assert moved > 0.7 * len(trained)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[4:]) < sum(losses[:2])


class Kept(TorchDispatchMode):
    """All memory that was made inside and is still held."""

    def __enter__(self):
        self.made = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


def of_one_step(kit, kind, recompute):
    """Loss, gradients and the bytes that are kept for the backward pass, with the backbone's dropout."""
    model = kit.module(adapters=KINDS[kind], backbone={"recompute": recompute, "train_dropout": "official"})
    data = mixed_tasks(kit)
    data.attach(model.collator("fit"))
    batch = next(iter(data.train_dataloader()))
    model.prepare(data.info(), data.stages())
    torch.manual_seed(1)
    for adapter in model.bank.adapters_of("live").values():
        if kind == "sparse_mask":
            adapter.set_scores({name: torch.rand(size) for name, size in adapter.sizes.items()})
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = model.example_inputs(batch)
    model.train()
    with Kept() as kept:
        loss = model.example_losses(inputs).mean()
        size = kept.bytes
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@every_kind
def test_recomputation_gives_the_same_numbers_in_less_memory(kind, kit):
    loss, gradients, size = of_one_step(kit, kind, False)
    again, gradients_again, smaller = of_one_step(kit, kind, True)
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    assert any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert smaller < size
