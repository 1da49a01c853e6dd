"""Lightning checkpoints as verified folders: same dict back, bitwise resume, published folders."""

import copy
import json
import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks import checkpoint_io
from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.rng import RandomStates, read_states, write_states
from fulgurite.checkpoints import (
    CheckpointError,
    DamagedError,
    MissingError,
    RefusedError,
    digest_of_bytes,
    read_manifest,
    verify,
)

BASE = {"source": "tiny", "digest": "xxh3_128:0a"}


class Toy(pl.LightningModule):
    """Draws from every generator while training, so that a resume that loses one of them is seen."""

    def __init__(self, rate=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 1))
        self.losses, self.validated_at = [], []

    def training_step(self, batch, index):
        noise = random.random() + np.random.rand() + np.random.randn()
        loss = (self.net(batch[0]) - batch[1] * noise).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch, index):
        self.validation_step(batch, index)

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.global_step)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Declared(Toy):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["fulgurite"] = {
            "kind": "delta",
            "base": BASE,
            "info": "xxh3_128:0b",
            "structure": {"rank": 2},
        }


def loader():
    generator = torch.Generator().manual_seed(0)
    items = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator))
    return DataLoader(items, 4, generator=torch.Generator())


def trainer(root, *callbacks, epochs=3, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        plugins=[DigestCheckpointIO()],
        callbacks=[RandomStates(), *callbacks],
        max_epochs=epochs,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(root, *callbacks, module=Toy, ckpt_path=None, **options):
    pl.seed_everything(1, verbose=False)
    model, fitter = module(), trainer(root, *callbacks, **options)
    fitter.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return fitter, model


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    published = []
    callback = PublishedCheckpoint(every_n_train_steps=8, save_top_k=-1)
    callback.subscribe(lambda trainer, module, path: published.append((trainer.global_step, path.name)))
    _, model = fit(root, callback)
    return root, model, published


def test_folders_and_hooks(unbroken):
    root, _, published = unbroken
    names = {"epoch=0-step=8", "epoch=1-step=16", "epoch=2-step=24", "last"}
    folder = root / "checkpoints"
    assert {path.name for path in folder.iterdir()} == names
    assert published == [(8, "epoch=0-step=8"), (16, "epoch=1-step=16"), (24, "epoch=2-step=24")]
    assert all(verify(folder / name).ok for name in names)
    manifest = read_manifest(folder / "last")
    facts = dict(manifest.facts)
    assert facts.pop("software")["torch"] == torch.__version__
    count = sum(p.numel() for p in Toy().parameters())
    parameters = {"trained": count, "model": count}
    assert facts == {"epoch": 2, "global_step": 24, "finite": True, "parameters": parameters}
    assert manifest.settings == {"rate": 0.01}
    assert manifest.metrics["val/loss"] > 0
    assert (manifest.kind, manifest.base) == ("self-contained", None)


@pytest.mark.parametrize("step", [8, 16])
def test_resume_is_bitwise(unbroken, tmp_path, step):
    root, model, _ = unbroken
    path = root / "checkpoints" / f"epoch={step // 8 - 1}-step={step}"
    _, resumed = fit(tmp_path, PublishedCheckpoint(every_n_train_steps=8), ckpt_path=path)
    assert resumed.losses == model.losses[step:]
    # A step checkpoint on an epoch's last batch waits for the validation of that epoch.
    assert "val/loss" in read_manifest(path).metrics
    assert resumed.validated_at == [at for at in model.validated_at if at > step]
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_whole_checkpoint_comes_back(tmp_path):
    """Against torch's own writer, on what Lightning really hands over."""
    io, seen = DigestCheckpointIO(), {}

    class Spy(DigestCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            torch.save(checkpoint, tmp_path / "torch.ckpt")
            super().save_checkpoint(checkpoint, path, storage_options)
            seen[str(path)] = torch.load(tmp_path / "torch.ckpt", weights_only=True)

    pl.seed_everything(1, verbose=False)
    fitter = trainer(tmp_path, ModelCheckpoint(tmp_path / "c", save_top_k=-1), epochs=1)
    fitter.strategy.checkpoint_io = Spy()
    fitter.fit(Toy(), loader(), loader())
    ((path, expected),) = seen.items()
    found = io.load_checkpoint(path)
    assert found.keys() == expected.keys()
    assert len(found["optimizer_states"][0]["state"]) == 6
    assert_same(found, expected)


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert a == b, where


def test_validate_test_and_predict_take_the_folder(unbroken, tmp_path):
    root, model, _ = unbroken
    path, other, runner = root / "checkpoints" / "last", Toy(), trainer(tmp_path)
    (scores,) = runner.validate(other, loader(), ckpt_path=path, verbose=False)
    assert scores["val/loss"] == read_manifest(path).metrics["val/loss"]
    assert runner.test(other, loader(), ckpt_path=path, verbose=False) == [scores]
    predicted = torch.cat(runner.predict(other, loader(), ckpt_path=path))
    with torch.no_grad():
        expected = model.eval().net(loader().dataset.tensors[0])
    assert torch.allclose(predicted, expected, atol=1e-6)


def test_top_k_by_a_monitor_and_weights_only(tmp_path):
    best = PublishedCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=2, save_last=False)
    light = PublishedCheckpoint(tmp_path / "light", filename="{epoch}", save_weights_only=True)
    fitter, _ = fit(tmp_path, best, light, epochs=4)
    kept = sorted((tmp_path / "best").iterdir())
    assert len(kept) == 2
    scores = {str(path): read_manifest(path).metrics["val/loss"] for path in kept}
    assert min(scores, key=scores.get) == best.best_model_path
    assert {path.name for path in (tmp_path / "light").iterdir()} == {"epoch=3", "last"}
    assert "optimizer_states" not in DigestCheckpointIO().load_checkpoint(tmp_path / "light" / "last")
    (found,) = fitter.validate(Toy(), loader(), ckpt_path=tmp_path / "light" / "last", verbose=False)
    assert found["val/loss"] == read_manifest(tmp_path / "light" / "last").metrics.get("val/loss", found["val/loss"])


def test_without_a_monitor_the_newest_stay_and_others_folders_are_left_alone(tmp_path):
    saved = PublishedCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=3)
    fitter, _ = fit(tmp_path, saved, epochs=1)
    saved.publish_now(fitter, "named")
    steps = {"epoch=0-step=4", "epoch=0-step=6", "epoch=0-step=8"}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {*steps, "last", "named"}
    again = PublishedCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=3)
    fit(tmp_path, again, epochs=2, ckpt_path=tmp_path / "c" / "last")
    steps = {f"epoch=1-step={step}" for step in (12, 14, 16)}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {*steps, "last", "named"}


def test_a_moved_run_goes_on_with_its_own_folders_and_holds_no_path_of_the_machine(tmp_path):
    saved = PublishedCheckpoint(tmp_path / "a" / "c", every_n_train_steps=4, monitor="val/loss", save_top_k=1)
    fit(tmp_path, saved, epochs=2)
    (tmp_path / "a").rename(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "b" / "c" / "last" / "state.json").read_text()
    again = PublishedCheckpoint(tmp_path / "b" / "c", every_n_train_steps=4, monitor="val/loss", save_top_k=1)
    fit(tmp_path, again, epochs=3, ckpt_path=tmp_path / "b" / "c" / "last")
    assert len(list((tmp_path / "b" / "c").iterdir())) <= 3  # the best, the newest, last
    assert Path(again.best_model_path).parent == tmp_path / "b" / "c"
    assert Path(again.best_model_path).is_dir()


def test_weights_that_are_not_finite_do_not_push_out_those_that_are(tmp_path):
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 5:
                pl_module.net[0].weight.data.fill_(float("nan"))

    saved = PublishedCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=1, save_last=False)
    fit(tmp_path, Spoil(), saved, epochs=1)
    kept = {path.name: read_manifest(path).facts["finite"] for path in (tmp_path / "c").iterdir()}
    assert kept == {"epoch=0-step=4": True, "epoch=0-step=8": False}


def test_the_last_good_checkpoint_is_never_deleted(tmp_path):
    class Damage(pl.Callback):
        """Every checkpoint but the first is spoilt as soon as it is there."""

        def on_checkpoint_published(self, trainer, pl_module, path):
            if trainer.global_step > 2:
                file = path / "weights.safetensors"
                file.write_bytes(file.read_bytes()[:-1])

    saved = PublishedCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=1, save_last=False)
    fit(tmp_path, Damage(), saved, epochs=1)
    good = [path.name for path in (tmp_path / "c").iterdir() if verify(path).ok]
    assert good == ["epoch=0-step=2"]


def test_what_the_module_declares_goes_to_the_manifest(tmp_path):
    fit(tmp_path, PublishedCheckpoint(), module=Declared, epochs=1)
    manifest = read_manifest(tmp_path / "checkpoints" / "last")
    assert (manifest.kind, manifest.base, manifest.structure) == ("delta", BASE, {"rank": 2})
    assert {name: manifest.facts[name] for name in ("epoch", "global_step", "info")} == {
        "epoch": 0,
        "global_step": 8,
        "info": "xxh3_128:0b",
    }
    loaded = DigestCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last")
    assert loaded["fulgurite"]["base"] == BASE


def test_damage_and_absence_stop_a_resume(unbroken, tmp_path):
    root, _, _ = unbroken
    fit(tmp_path, PublishedCheckpoint(), epochs=1)
    file = tmp_path / "checkpoints" / "last" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        DamagedError, match=r"state\.safetensors.*tensor 'state/.*checkpoints/epoch=0-step=8 \(step 8\)"
    ):
        fit(tmp_path / "x", ckpt_path=tmp_path / "checkpoints" / "last")
    other = tmp_path / "checkpoints" / "epoch=0-step=8" / "weights.safetensors"
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="There is no other good checkpoint in"):
        fit(tmp_path / "x", ckpt_path=tmp_path / "checkpoints" / "last")
    with pytest.raises(MissingError, match="nowhere"):
        fit(tmp_path / "x", ckpt_path=root / "nowhere")


def test_an_object_in_the_hyper_parameters_is_refused_by_name(tmp_path):
    with pytest.raises(RefusedError, match=r"settings/net.*Linear"):
        DigestCheckpointIO().save_checkpoint(
            {"state_dict": {}, "hyper_parameters": {"net": nn.Linear(1, 1)}}, tmp_path / "c"
        )
    assert list(tmp_path.iterdir()) == []


def test_other_values_in_a_state_dict_and_module_versions(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    state["extra_state"] = {"scale": 2.0, "seen": [1, 2]}
    state.move_to_end("extra_state", last=False)
    io = DigestCheckpointIO()
    io.save_checkpoint({"state_dict": state, "epoch": 1}, tmp_path / "c")
    found = io.load_checkpoint(tmp_path / "c")["state_dict"]
    assert list(found) == list(state)
    assert found["extra_state"] == state["extra_state"]
    assert found._metadata[""]["version"] == 2
    io.remove_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_replaced_while_it_is_read_is_not_mixed(tmp_path, monkeypatch):
    io, path = DigestCheckpointIO(), tmp_path / "last"
    io.save_checkpoint({"state_dict": {"w": torch.zeros(1)}, "global_step": 1}, path)
    load = checkpoint_io.load_tensors

    def replace_first(*args):
        io.save_checkpoint({"state_dict": {"w": torch.ones(1)}, "global_step": 2}, path)
        return load(*args)

    monkeypatch.setattr(checkpoint_io, "load_tensors", replace_first)
    with pytest.raises(CheckpointError, match="last was replaced"):
        io.load_checkpoint(path)


JUNK = [None, True, -1, 1e300, "x", "../y", [], {}, {"$": ["tensor", "q"]}, {"$": ["device", "z"]}, {"$": [1]}]


def spoilt(value, generator):
    """``value`` with one entry somewhere in it renamed or replaced by junk."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not keys or generator.random() < 0.1:
        return generator.choice(JUNK)
    key = generator.choice(keys)
    if isinstance(value, dict) and generator.random() < 0.15:
        value[generator.choice(["$", "other"])] = value.pop(key)
    else:
        value[key] = spoilt(value[key], generator)
    return value


def test_only_typed_errors_escape_from_well_signed_nonsense(tmp_path):
    """Digests cannot help against a file that was made wrong; it must still end in one error that names the path."""
    io, path, generator = DigestCheckpointIO(), tmp_path / "c", random.Random(0)
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "epoch": 1, "optimizer_states": [optimizer]}, path)
    sound = {name: json.loads((path / name).read_text()) for name in ("state.json", "manifest.json")}
    refused = 0
    for index in range(200):
        state, manifest = copy.deepcopy(sound["state.json"]), copy.deepcopy(sound["manifest.json"])
        if index % 2:
            state = spoilt(state, generator)
        data = json.dumps(state).encode()
        manifest["files"]["state.json"] = {"bytes": len(data), "digest": digest_of_bytes(data)}
        manifest.pop("digest")
        manifest = manifest if index % 2 else spoilt(manifest, generator)
        body = json.dumps(manifest, indent=2).removesuffix("\n}").encode() + b","
        (path / "state.json").write_bytes(data)
        (path / "manifest.json").write_bytes(body + b'\n  "digest": "%s"\n}\n' % digest_of_bytes(body).encode())
        try:
            io.load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_crashed_leftovers_are_cleared_at_the_start(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, PublishedCheckpoint(), epochs=1)
    (folder / "last").rename(folder / ".last.old")
    (folder / ".last.tmp-999999999-00000000").mkdir()
    fit(tmp_path, PublishedCheckpoint(), epochs=1, limit_train_batches=0)
    assert {path.name for path in folder.iterdir()} == {"epoch=0-step=8", "last"}


def test_random_states_by_value():
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    random.gauss(0, 1), np.random.randn()
    states = read_states()
    draw = lambda: (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist())  # noqa: E731
    first = draw()
    assert draw() != first
    write_states(states)
    assert draw() == first


def test_states_of_another_number_of_ranks_are_not_restored(tmp_path):
    callback, fitter = RandomStates(), trainer(tmp_path)
    callback.load_state_dict({"ranks": [read_states(), read_states()]})
    torch.manual_seed(7)
    before = torch.get_rng_state()
    callback.on_train_batch_start(fitter)
    assert torch.equal(torch.get_rng_state(), before)
