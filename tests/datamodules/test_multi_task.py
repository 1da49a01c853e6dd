import copy
import random

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.datamodules.multi_task import MultiTask
from fulgurite.samples import DataError


def tasks(folder, **options):
    """Seven training, three validation and five test questions of each of two tasks."""
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    parts = [JsonlDataModule(folder / d, domain=d, **files) for d in "ab"]
    return MultiTask(parts, **{"batch_size": 2, **options})


def seen(watcher, phase="train", epoch=None):
    return [ids for p, e, ids in watcher.seen if p == phase and epoch in (None, e)]


def test_one_task_a_batch_and_every_sample_once(folder, trainer, watcher):
    data = tasks(folder, batch_sizes=[2, 4])
    t = trainer(max_epochs=2, reload_dataloaders_every_n_epochs=0)
    t.fit(watcher, datamodule=data)
    assert [(s.name, s.domains, s.epochs, s.num_batches) for s in data.stages()] == [("all", ("a", "b"), 2, 6)]
    for epoch in range(2):
        batches = seen(watcher, epoch=epoch)
        assert sorted(map(len, batches)) == [1, 2, 2, 2, 3, 4]
        assert all(len({name[0] for name in ids}) == 1 for ids in batches)
        assert sorted(watcher.ids("train", epoch)) == [f"{d}/{i + 1}" for d in "ab" for i in range(7)]
    orders = [[ids[0][0] for ids in seen(watcher, epoch=epoch)] for epoch in range(2)]
    for epoch, order in enumerate(orders):
        turns = ["a"] * 4 + ["b"] * 2
        random.Random(epoch).shuffle(turns)
        assert order == [turns.pop() for _ in range(6)]
    assert seen(watcher, "val", 1) == [["a/1", "a/2"], ["a/3"], ["b/1", "b/2"], ["b/3"]]
    assert list(t.predict(watcher, datamodule=data))[2:4] == [["a/5"], ["b/1", "b/2"]]


def test_mixed_batches_and_shares(folder, trainer, watcher):
    data = tasks(folder, batches="mixed", batch_size=7)
    trainer(reload_dataloaders_every_n_epochs=0).fit(watcher, datamodule=data)
    batches = seen(watcher)
    assert [len(ids) for ids in batches] == [7, 7]
    assert {name[0] for name in batches[0]} == {"a", "b"}
    assert data.stages()[0].num_batches == 2
    (folder / "b" / "train.jsonl").write_text("".join((folder / "b" / "train.jsonl").open().readlines()[:3]))
    for options, expected in (
        ({"sampling": "balanced"}, [3, 3]),  # 4 and 2 batches
        ({"sampling": "temperature", "temperature": 1.0}, [4, 2]),
        ({"sampling": "temperature", "temperature": 1e6}, [3, 3]),
        ({"sampling": "balanced", "batches": "mixed"}, [5, 5]),  # 7 and 3 samples
    ):
        given = tasks(folder, **options)
        assert given._sampler("train", given.samples("train")).counts == expected


def test_resume_from_any_step_is_exact(folder, trainer, watcher, tmp_path):
    saver = ModelCheckpoint(
        tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    options = {"max_epochs": 2, "enable_checkpointing": True, "reload_dataloaders_every_n_epochs": 0}
    start = copy.deepcopy(watcher)
    trainer(**options, callbacks=[saver]).fit(watcher, datamodule=tasks(folder))
    for step in (1, 7, 8, 11):
        resumed = copy.deepcopy(start)
        trainer(**options).fit(resumed, datamodule=tasks(folder), ckpt_path=tmp_path / "steps" / f"{step}.ckpt")
        assert seen(resumed) == seen(watcher)[step:]
        assert torch.equal(resumed.map.weight, watcher.map.weight)


def test_bad_options(folder):
    for options, message in (
        ({"batch_sizes": [2]}, "batch_sizes"),
        ({"batch_sizes": [2, 0]}, "batch_sizes"),
        ({"batch_sizes": [2, 2], "batches": "mixed"}, "data.batch_size"),
        ({"sampling": "temperature", "temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(DataError, match=message):
            tasks(folder, **options)
