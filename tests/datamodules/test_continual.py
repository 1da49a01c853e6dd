import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.samples import DataError, DataInfo


def stream(folder, epochs=2, domains="ab", **options):
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    parts = [JsonlDataModule(folder / d, domain=d, **files) for d in domains]
    return ContinualDataModule(parts, epochs, **{"batch_size": 2, **options})


def of(domain, count):
    return [f"{domain}/{i + 1}" for i in range(count)]


def test_facts_in_training_order(folder):
    info = stream(folder, domains="ba").info()
    assert info.domains == ("b", "a")
    assert info.answers == ("b0", "b1", "b2", "both", "a0", "a1", "a2")
    assert info.kinds == ("kind b", "kind a")
    stages = stream(folder, [1, 3], domains="ba").stages()
    assert [(s.name, s.domains, s.epochs, s.num_batches) for s in stages] == [
        ("b", ("b",), 1, 4),
        ("a", ("a",), 3, 4),
    ]
    joint = stream(folder, 5, joint=True).stages()
    assert [(s.name, s.domains, s.epochs, s.num_batches) for s in joint] == [("all", ("a", "b"), 5, 7)]


@pytest.mark.parametrize("validate", ["stage_end", "every_epoch"])
def test_one_domain_a_stage_and_all_at_its_end(folder, trainer, watcher, validate):
    t = trainer(max_epochs=4, num_sanity_val_steps=2)
    data = stream(folder, validate=validate)
    t.fit(watcher, datamodule=data)
    for epoch, domain in enumerate("aabb"):
        assert sorted(watcher.ids("train", epoch)) == of(domain, 7)
    watcher.seen = [s for s in watcher.seen if s[0] != "val" or s[1] > 0]  # epoch 0 has the sanity check too
    both = of("a", 3) + of("b", 3)
    assert watcher.ids("val", 1) == watcher.ids("val", 3) == both
    assert watcher.ids("val", 2) == (of("b", 3) if validate == "every_epoch" else [])
    t.validate(watcher, datamodule=data)
    t.test(watcher, datamodule=data)
    assert watcher.ids("test") == of("a", 5) + of("b", 5)
    predicted = t.predict(watcher, datamodule=data)
    assert [i for ids in predicted for i in ids] == of("a", 5) + of("b", 5)


def test_joint(folder, trainer, watcher):
    trainer(max_epochs=2, reload_dataloaders_every_n_epochs=0).fit(
        watcher, datamodule=stream(folder, 2, joint=True, validate="every_epoch")
    )
    assert sorted(watcher.ids("train", 1)) == of("a", 7) + of("b", 7)
    assert watcher.ids("val", 0) == of("a", 3) + of("b", 3)


@pytest.mark.parametrize(("workers", "limit"), [(0, 4), (0, 3), (2, 4)])
def test_resume_from_every_step_is_exact(folder, trainer, watcher, workers, limit, tmp_path):
    def saver():
        return ModelCheckpoint(
            tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
        )

    options = {"max_epochs": 4, "enable_checkpointing": True, "limit_train_batches": limit}
    start = copy.deepcopy(watcher)
    trainer(**options, callbacks=[saver()]).fit(watcher, datamodule=stream(folder, num_workers=workers))
    reference = [s for s in watcher.seen if s[0] == "train"]
    assert len(reference) == 4 * limit
    for step in (limit - 1, 2 * limit + 1) if workers else range(1, 4 * limit):
        resumed = copy.deepcopy(start)
        trainer(**options).fit(
            resumed,
            datamodule=stream(folder, num_workers=workers),
            ckpt_path=tmp_path / "steps" / f"{step}.ckpt",
        )
        assert [s for s in resumed.seen if s[0] == "train"] == reference[step:]
        assert torch.equal(resumed.map.weight, watcher.map.weight)


def test_settings_that_stages_need(folder, trainer, watcher):
    with pytest.raises(DataError, match="reload_dataloaders_every_n_epochs to 1"):
        trainer(max_epochs=4, reload_dataloaders_every_n_epochs=0).fit(watcher, datamodule=stream(folder))
    with pytest.raises(DataError, match="max_epochs to 4"):
        trainer(max_epochs=9).fit(watcher, datamodule=stream(folder))
    with pytest.raises(DataError, match=r"\['a'\] occur twice"):
        stream(folder, domains="aa").info()
    with pytest.raises(DataError, match="empty"):
        ContinualDataModule([], 1)
    for epochs in (0, [1], [1, 2, 3]):
        with pytest.raises(DataError, match="epochs_per_domain"):
            stream(folder, epochs)


def test_fewer_epochs_end_with_all_domains(folder, trainer, watcher):
    trainer(max_epochs=1, fast_dev_run=False).fit(watcher, datamodule=stream(folder))
    assert watcher.ids("val", 0) == of("a", 3) + of("b", 3)


def test_skipping_holds_for_all_domains(folder, trainer, watcher):
    (folder / "b" / "0.mp4").write_bytes(b"")
    data = stream(folder, 1, on_bad="skip")
    trainer(max_epochs=2).fit(watcher, datamodule=data)
    assert sorted(watcher.ids("train", 1)) == ["b/2", "b/3", "b/5", "b/6"]
    assert data.stages()[1].num_batches == 2
    assert {s["domain"] for s in data.skipped} == {"b"}
    assert {s["where"].partition(", ")[0] for s in data.skipped} == {"0.mp4"}
    assert str(folder) not in json.dumps(data.skipped)


def test_loading_options_of_a_domain_that_the_stream_has_not_are_refused(folder):
    own = {"on_bad": "skip", "batch_size": 2, "num_workers": 3, "seed": 9, "feature_dtype": "float32"}
    for name, value in {**own, "eval_batch_size": 5}.items():
        domains = [
            JsonlDataModule(folder / "a", domain="a"),
            JsonlDataModule(folder / "b", domain="b", **{name: value}),
        ]
        message = rf"{name}={value!r} of domains\[1\] \(JsonlDataModule\); set data\.init_args\.{name} of the stream"
        with pytest.raises(DataError, match=message):
            ContinualDataModule(domains, 1)
        assert ContinualDataModule(domains, 1, **{name: value}).domains == domains
    with pytest.raises(DataError, match=r"data\.init_args\.batch_size, .*data\.init_args\.seed of the stream"):
        ContinualDataModule([JsonlDataModule(folder / "a", **own)], 1)
    domain = JsonlDataModule(folder / "a", batch_size=2, feature_cache=folder / "cache")
    data = ContinualDataModule([domain], 1, batch_size=2, eval_batch_size=4, feature_cache=folder / "other")
    assert data.domains[0].feature_cache == folder / "cache"
    same = JsonlDataModule(folder / "a", batch_size=2, eval_batch_size=2)
    assert ContinualDataModule([same], 1, batch_size=2).eval_batch_size == 2


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_an_evaluation_reads_its_own_files_alone(folder, trainer, watcher, stage):
    """Broken files of the other splits do not matter; a fit afterwards knows what the training files hold."""
    content = {
        path: path.read_text() for d in "ab" for split in ("train", "val") for path in [folder / d / f"{split}.jsonl"]
    }
    for path in content:
        path.write_text("{broken")
    data, t = stream(folder, 1), trainer(max_epochs=2)
    getattr(t, stage)(watcher, datamodule=data)
    assert [s.id for s in data.samples(stage)] == of("a", 5) + of("b", 5)
    assert data.info() == DataInfo(("a", "b"), (), ("kind a", "kind b"))
    for path, text in content.items():
        path.write_text(text)
    t.fit(watcher, datamodule=data)
    assert data.info().answers == ("a0", "a1", "a2", "both", "b0", "b1", "b2")
    getattr(t, stage)(watcher, datamodule=data)
    assert data.info().answers == ("a0", "a1", "a2", "both", "b0", "b1", "b2")
