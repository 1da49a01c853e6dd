import copy
import json
import types

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.samples import DataError
from fulgurite.samples.features import FeatureExtractor
from fulgurite.samples.sampling import FrameSampling


def data(folder, **options):
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    return JsonlDataModule(folder / "a", domain="a", **{**files, "batch_size": 2, **options})


def small(frames):
    return frames.float() / 255


class MeanEncoder(torch.nn.Module):
    name = "mean"
    fingerprint = "1"
    transform = staticmethod(small)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, pixels):
        self.calls += len(pixels)
        return pixels.mean((2, 3)).unsqueeze(1) * self.weight


class HeavyCollator:
    needs = ()

    def __init__(self):
        self.encoder = MeanEncoder()

    def __call__(self, samples):
        return {}


def test_all_loops(folder, trainer, watcher):
    module, t = data(folder), trainer(max_epochs=2)
    t.fit(watcher, datamodule=module)
    assert sorted(watcher.ids("train", 0)) == sorted(watcher.ids("train", 1)) == [str(i) for i in range(1, 8)]
    assert watcher.ids("train", 0) != watcher.ids("train", 1)
    assert watcher.ids("val", 1) == ["1", "2", "3"]
    t.test(watcher, datamodule=module)
    assert watcher.ids("test") == ["1", "2", "3", "4", "5"]
    assert t.predict(watcher, datamodule=module) == [["1", "2"], ["3", "4"], ["5"]]


def test_overfit_keeps_the_same_batches(folder, trainer, watcher):
    trainer(max_epochs=3, overfit_batches=1).fit(watcher, datamodule=data(folder))
    assert watcher.ids("train", 0) == watcher.ids("train", 2) == ["1", "2"]


def test_without_a_trainer(folder, watcher):
    module = data(folder)
    with pytest.raises(DataError, match="attach"):
        module.setup("fit")
    module.attach(watcher.collator("fit"))
    module.setup("fit")
    assert len(list(module.train_dataloader())) == 4
    assert [name for batch in module.within_fit("test") for name in batch["id"]] == ["1", "2", "3", "4", "5"]
    with pytest.raises(TypeError, match="MeanEncoder"):
        module.attach(HeavyCollator())


def test_missing_field_names_field_source_and_module(folder, trainer, watcher, monkeypatch):
    monkeypatch.setattr(watcher.collator_class, "needs", ("question", "speech"))
    with pytest.raises(DataError, match=r"Watcher.*'speech'.*JsonlDataModule"):
        trainer().fit(watcher, datamodule=data(folder))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_bad_video_stops_or_is_skipped(folder, trainer, watcher, damage):
    path = folder / "a" / "1.mp4"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(DataError, match=r"1\.mp4.*on_bad"):
        trainer().fit(watcher, datamodule=data(folder))
    module, t = data(folder, on_bad="skip"), trainer()
    t.fit(watcher, datamodule=module)
    assert sorted(watcher.ids("train")) == ["1", "3", "4", "6", "7"]
    lines = (folder / "run" / "skipped.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    assert [(n["split"], n["domain"]) for n in noted] == [("train", "a"), ("train", "a"), ("val", "a")]
    assert [n["where"] for n in noted] == ["1.mp4, id 2", "1.mp4, id 5", "1.mp4, id 2"]
    assert all(n["reason"].startswith("1.mp4: ") and str(folder) not in n["reason"] for n in noted)
    assert module.stages()[0].num_batches == 3


def test_a_trial_run_writes_nothing(folder, trainer, watcher):
    (folder / "a" / "1.mp4").write_bytes(b"")
    module = data(folder, on_bad="skip")
    trainer(fast_dev_run=1).fit(watcher, datamodule=module)
    assert len(module.skipped) == 3
    assert not (folder / "run").exists()


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size"])
def test_a_batch_holds_at_least_one(folder, option):
    with pytest.raises(DataError, match=rf"data\.{option}=0 must be at least 1"):
        data(folder, **{option: 0})
    module = data(folder, batch_size=3, eval_batch_size=None)
    assert (module.batch_size, module.eval_batch_size) == (3, 3)


def test_counts_are_logged(folder, trainer, watcher, caplog):
    (folder / "a" / "v.json").write_text('["a1", "a2", "a0"]')
    (folder / "a" / "2.mp4").write_bytes(b"")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer().fit(watcher, datamodule=data(folder, on_bad="skip", vocabulary="v.json"))
    assert "a train: 4 kept, 1 filtered, 2 skipped" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_cached_and_used(folder, trainer, watcher, workers):
    def fit(encoder):
        watcher.feature_extractor = types.MethodType(
            lambda self: FeatureExtractor(encoder, FrameSampling("uniform", 2)), watcher
        )
        module = data(folder, feature_cache=folder / "cache", num_workers=workers)
        trainer().fit(watcher, datamodule=module)
        return module

    encoder = MeanEncoder()
    module = fit(encoder)
    assert encoder.calls == 3 * 2  # three clips, two frames, whatever the number of questions
    sample = module.samples("train")[1]
    expected = small(sample.video.frames([1, 4])).mean((2, 3)).unsqueeze(1)
    torch.testing.assert_close(sample.features["mean"].float(), expected, atol=1e-3, rtol=0)
    again = MeanEncoder()
    fit(again)
    assert again.calls == 0


def test_bad_video_with_a_cache(folder, trainer, watcher):
    watcher.feature_extractor = lambda: FeatureExtractor(MeanEncoder(), FrameSampling("uniform", 2))
    (folder / "a" / "1.mp4").write_bytes(b"nothing")
    options = {"feature_cache": folder / "cache"}
    with pytest.raises(DataError, match=r"1\.mp4"):
        trainer().fit(watcher, datamodule=data(folder, **options))
    trainer().fit(watcher, datamodule=data(folder, on_bad="skip", **options))
    assert len(watcher.ids("train")) == 5


class TwoRanks:
    world_size, global_rank, max_epochs = 2, 1, 1
    distributed_sampler_kwargs = {"num_replicas": 2, "rank": 1}  # noqa: RUF012
    overfit_batches = 0

    def __init__(self, wraps):
        self._accelerator_connector = types.SimpleNamespace(use_distributed_sampler=wraps)
        self.lightning_module = None


def test_options_that_would_spoil_ranks(folder):
    module = data(folder, batch_size=3)
    module.trainer = TwoRanks(wraps=False)
    with pytest.raises(DataError, match=r"batch_size=3.*multiple of 2"):
        module.setup("fit")
    module = data(folder, batch_size=4)
    module.trainer = TwoRanks(wraps=True)
    with pytest.raises(DataError, match=r"use_distributed_sampler"):
        module.setup("fit")


@pytest.mark.parametrize("limit", [2, 4])
def test_resume_without_reloading_is_exact(folder, trainer, watcher, limit, tmp_path):
    """A limited epoch leaves the loader in the middle; the next epoch must still start at its beginning."""
    saver = ModelCheckpoint(
        tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    at_epoch = ModelCheckpoint(
        tmp_path / "epochs", "{step}", save_top_k=-1, auto_insert_metric_name=False, save_on_train_epoch_end=True
    )
    options = {
        "max_epochs": 3,
        "enable_checkpointing": True,
        "reload_dataloaders_every_n_epochs": 0,
        "limit_train_batches": limit,
    }
    start = copy.deepcopy(watcher)
    trainer(**options, callbacks=[saver, at_epoch]).fit(watcher, datamodule=data(folder))
    reference = [s for s in watcher.seen if s[0] == "train"]
    for path in [*(tmp_path / "steps").iterdir(), *(tmp_path / "epochs").iterdir()]:
        if path.stem == str(3 * limit):
            continue
        resumed = copy.deepcopy(start)
        trainer(**options).fit(resumed, datamodule=data(folder), ckpt_path=path)
        assert [s for s in resumed.seen if s[0] == "train"] == reference[int(path.stem) :], path
        assert torch.equal(resumed.map.weight, watcher.map.weight)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_epochs": 4}, 4),
        ({"max_epochs": -1, "max_steps": 5}, 3),
        ({"max_epochs": -1, "max_steps": 5, "limit_train_batches": 1}, 5),
        ({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, 5),
    ],
)
def test_one_stage_is_as_long_as_the_fit(options, epochs, folder, watcher, trainer):
    module = data(folder, batch_size=4)
    lengths = []
    watcher.on_train_start = lambda: lengths.append(module.stages()[0].epochs)
    trainer(**options).fit(watcher, datamodule=module)
    assert lengths == [epochs]
    assert {epoch for phase, epoch, _ in watcher.seen if phase == "train"} == set(range(epochs))


def test_a_fit_without_end_is_refused(folder, watcher, trainer):
    with pytest.raises(DataError, match=r"trainer\.max_epochs or trainer\.max_steps"):
        trainer(max_epochs=-1).fit(watcher, datamodule=data(folder))
