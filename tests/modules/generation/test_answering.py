"""What modules that answer in texts share, without a model of language."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules import answering
from fulgurite.modules.answering import AnsweringModule
from fulgurite.samples import DataError, DataInfo, Sample, Stage, sample_fields

BOTTLENECK = partial(Bottleneck, reduction=2)
PER_TASK = partial(PerTask, kind=BOTTLENECK, tasks=["vqa", "gqa"])


class Backbone(FrozenBackbone):
    source, fingerprint = "none", "0"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.spec = ModelSpec(towers=(), points={"layer": ("layer", 1)})
        self.freeze()

    def collator(self, stage):
        return None


class Module(AnsweringModule):
    """Answers yes."""

    example_inputs = example_losses = example_logits = None

    def __init__(self, kind=BOTTLENECK, **trainer):
        super().__init__(Backbone(), [Placement(["layer"], kind)])
        self.logged = {}
        stages = (Stage("all", ("d",), 1, 1),)
        data = {"info": lambda: DataInfo(("d",), tasks=("gqa",)), "stages": lambda: stages}
        given = {"datamodule": SimpleNamespace(**data), "ckpt_path": None, "sanity_checking": False, "world_size": 1}
        self.trainer = SimpleNamespace(**given | trainer)

    def write(self, batch):
        return ["yes"] * len(batch["id"])

    def log(self, name, value, **options):
        self.logged[name] = value


def batch_of(*answers, task="gqa"):
    samples = [Sample(id=str(i), domain="d", task=task, answers={a: 1.0}) for i, a in enumerate(answers)]
    return sample_fields(samples)


@pytest.mark.parametrize(("stage", "ckpt_path", "starts"), [("fit", None, 1), ("fit", "a.ckpt", 0), ("test", None, 0)])
def test_a_run_that_begins_starts_from_the_data_and_one_that_goes_on_does_not(stage, ckpt_path, starts, monkeypatch):
    module, calls = Module(ckpt_path=ckpt_path), []
    monkeypatch.setattr(answering, "start_from_data", lambda *given: calls.append(given))
    module.setup(stage)
    assert calls == [(module.trainer, module)] * starts
    assert module.info.tasks == ("gqa",)


def test_tasks_have_the_numbers_of_their_adapters_and_others_are_an_error():
    assert Module().task_numbers(batch_of("yes")) is None
    batch = {"task": ["gqa", "vqa", "gqa"]}
    assert Module(PER_TASK).task_numbers(batch).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"tasks \['nlvr2'\] have no adapters; there are those of \['vqa', 'gqa'\]"):
        Module(PER_TASK).task_numbers({"task": ["gqa", "nlvr2"]})


@pytest.mark.parametrize(
    ("batches", "tasks", "own"),
    [("one_task", ("vqa", "gqa"), 1), ("one_task", ("gqa",), 0), ("mixed", ("vqa", "gqa"), 0)],
)
def test_the_loss_is_the_weighted_sum_and_is_logged_by_task_where_batches_have_one(batches, tasks, own):
    module = Module(
        datamodule=SimpleNamespace(batches=batches), strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    )
    module.info = DataInfo(("d",), tasks=tasks)
    losses, ones = torch.tensor([1.0, 2.0, 6.0]), torch.ones(3)
    batch = {**batch_of("a", "b", "c"), "counted": torch.tensor([True, True, False])}
    loss = module.batch_loss(losses, batch, ["scored"] * 3, torch.tensor([1.0, 0.5, 1.0]), ones)
    assert loss == 1.0
    assert module.logged == {"train/loss": 1.0} | ({"train/loss/gqa": 1.0} if own else {})
    module.trainer.world_size = 2  # strategies take the mean over processes
    assert module.batch_loss(losses, batch, ["scored"] * 3, torch.tensor([1.0, 0.5, 1.0]), ones) == 2.0


def test_each_validation_counts_anew_and_a_check_before_training_logs_nothing():
    for checking in (True, False):
        module = Module(sanity_checking=checking)
        module.info = DataInfo(("d",), tasks=("vqa",))
        module.data_info = module.trainer.datamodule.info()  # figures are of the present data
        for answers in (("yes", "yes"), ("yes", "no")):
            module.on_validation_start()
            module.validation_step(batch_of(*answers), 0)
            module.on_validation_epoch_end()
        assert module.logged == ({} if checking else {"val/accuracy/gqa": 50.0, "val/score": 50.0})
    assert module.scores([batch_of("yes"), batch_of("no", "no")]) == pytest.approx(
        {"accuracy/gqa": 100 / 3, "score": 100 / 3}
    )


def test_predictions_say_whose_they_are():
    batch = {**batch_of("yes", "no"), "counted": torch.tensor([False, True])}
    assert Module().predict_step(batch, 0) == [{"id": "1", "task": "gqa", "answer": "yes"}]


def test_a_mask_is_renewed_by_scores_from_training_samples(monkeypatch):
    module = Module()
    monkeypatch.setattr(answering, "scores_of_mask", lambda *given: given)
    assert module.mask_scores("mask") == (module.trainer, module, "mask")
