"""Steps as library calls and in a plain Trainer: sources chosen, chains, what is done once, what is refused."""

import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from fulgurite.callbacks.boundary import Boundary
from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.merge_step import Checkpoints, MergeAtCheckpoint
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.steps import Context, Step, described
from fulgurite.checkpoints import (
    DamagedError,
    WriteError,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.atomic import inject_faults
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.opcm import Opcm, OpcmState
from fulgurite.methods.merging.ties import Ties
from fulgurite.samples import DataInfo, Sample, sample_fields


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Negate(Step):
    """-W of the one source, as a user would write it."""

    kind = "negated"

    def make(self, inputs, context, facts):
        (source,) = inputs
        tensors = {name: -tensor for name, tensor in load_tensors(source).items()}
        parents = [{"path": str(source), "digest": read_manifest(source).digest}]
        save_checkpoint_folder(context.out, {"weights": tensors}, parents=parents, facts=facts)


class Refusing(Negate):
    """Finds the disk full."""

    def make(self, inputs, context, facts):
        raise WriteError("the disk is full")


def trainer_of(folder, *boundaries, top=-1, **options):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DigestCheckpointIO()],
        callbacks=[*boundaries, PublishedCheckpoint(save_top_k=top)],
        **{"max_epochs": 4, **options},
    )


def data():
    return DataLoader(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), batch_size=2)


def mean_of(paths):
    states = [load_tensors(path) for path in paths]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def names(folder):
    return sorted(p.name for p in (folder / "artefacts").iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four epochs of two steps, merged two by two; and a chain at the end."""
    folder = tmp_path_factory.mktemp("net")
    pairs = MergeAtCheckpoint(Average(), Checkpoints(last=2), name="pair")
    last = MergeAtCheckpoint(Average(), Checkpoints(last=3), name="three")
    boundaries = [
        Boundary([pairs], at="checkpoint", every=2, evaluate=None),
        Boundary([last, Negate("minus")], at="fit_end", evaluate=None),
    ]
    torch.manual_seed(0)
    trainer_of(folder, *boundaries).fit(Net(), data())
    return folder


def test_whole_models_are_merged_and_keep_what_a_checkpoint_needs(run):
    assert names(run) == ["merged-pair-step=4", "merged-pair-step=8", "merged-three-step=8", "negated-minus-step=8"]
    at = {step: next((run / "checkpoints").glob(f"*step={step}")) for step in (2, 4, 6, 8)}
    for artefact, steps in {"merged-pair-step=4": (2, 4), "merged-three-step=8": (4, 6, 8)}.items():
        torch.testing.assert_close(load_tensors(run / "artefacts" / artefact), mean_of([at[s] for s in steps]))
        manifest = read_manifest(run / "artefacts" / artefact)
        assert [p["digest"] for p in manifest.parents] == [read_manifest(at[s]).digest for s in steps]
        assert manifest.facts["change"].keys() == {"layer.weight", "layer.bias"}
    module = Net()
    trainer_of(run / "again").validate(Validated(), data(), ckpt_path=str(run / "artefacts" / "merged-pair-step=4"))
    assert module is not None


class Validated(Net):
    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch).mean())


def test_a_later_step_goes_on_from_the_one_before(run):
    three, minus = (load_tensors(run / "artefacts" / n) for n in ("merged-three-step=8", "negated-minus-step=8"))
    assert all(torch.equal(minus[name], -three[name]) for name in three)
    (parent,) = read_manifest(run / "artefacts" / "negated-minus-step=8").parents
    assert Path(parent["path"]).name == "merged-three-step=8"


def test_fitting_twice_with_one_trainer_counts_anew(tmp_path):
    boundary = Boundary([Negate("minus")], at="checkpoint", every=2, evaluate=None)
    trainer = trainer_of(tmp_path, boundary, max_epochs=3)
    trainer.fit(Net(), data())
    assert (boundary.count, boundary.step) == (3, 6)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(Net(), data())
    assert (boundary.count, boundary.step) == (2, 10)
    assert names(tmp_path) == ["negated-minus-step=10", "negated-minus-step=4"]


def test_the_end_of_a_fit_that_keeps_no_last_is_published_for_its_steps(tmp_path):
    boundary = Boundary([Negate("minus")], at="fit_end", evaluate=None)
    trainer = trainer_of(tmp_path, boundary, max_epochs=3)
    trainer.callbacks[-1] = PublishedCheckpoint(save_last=False, every_n_epochs=2)
    module = Net()
    trainer.fit(module, data())
    assert names(tmp_path) == ["negated-minus-step=6"]
    made = load_tensors(tmp_path / "artefacts" / "negated-minus-step=6")
    assert torch.equal(made["layer.weight"], -module.layer.weight)


def test_a_step_that_fails_ends_the_fit_and_leaves_nothing(tmp_path):
    boundary = Boundary([Refusing("full")], at="checkpoint", evaluate=None)
    with pytest.raises(WriteError, match="the disk is full"):
        trainer_of(tmp_path, boundary).fit(Net(), data())
    assert not (tmp_path / "artefacts").exists()


def test_a_fault_while_writing_leaves_the_folder_as_it_was(run, tmp_path):
    def hook(point):
        if point == "before_manifest":
            raise WriteError("the disk is full")

    (source,) = (run / "checkpoints").glob("*step=8")
    with inject_faults(hook), pytest.raises(WriteError):
        MergeAtCheckpoint(Average(), Checkpoints(last=2))([source], Context(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_made_once_of_the_same_and_again_of_others(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (source,) = (run / "checkpoints").glob("*step=8")
    (older,) = (run / "checkpoints").glob("*step=4")
    context = Context(tmp_path / "out")
    assert Negate("a")([source], context) == tmp_path / "out"
    first = read_manifest(tmp_path / "out").digest
    Negate("a")([source], context)
    assert read_manifest(tmp_path / "out").digest == first
    assert "is there already" in caplog.messages[-1]
    Negate("b")([source], context)
    second = read_manifest(tmp_path / "out").digest
    Negate("b")([older], context)
    assert len({first, second, read_manifest(tmp_path / "out").digest}) == 3
    same = tmp_path / "elsewhere"
    source.rename(same)
    try:
        assert Negate("b")([same], Context(tmp_path / "moved")) == tmp_path / "moved"
        made = read_manifest(tmp_path / "moved").digest
        same.rename(source)
        Negate("b")([source], Context(tmp_path / "moved"))
        assert read_manifest(tmp_path / "moved").digest == made  # the same weights, wherever they lie
    finally:
        if same.exists():
            same.rename(source)


def test_a_damaged_source_is_named_and_nothing_made(run, tmp_path):
    import shutil

    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (source,) = (tmp_path / "checkpoints").glob("*step=8")
    (older,) = (tmp_path / "checkpoints").glob("*step=6")
    file = older / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(DamagedError, match="step=6"):
        MergeAtCheckpoint(Average(), Checkpoints(last=2))([source], Context(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class Ids:
    needs = ()

    def __call__(self, samples):
        return sample_fields(samples)


class Twelve(FulguriteDataModule):
    def read(self, split):
        return [Sample(id=f"{split}{i}", domain="d", question="?") for i in range(12)]

    def info(self):
        return DataInfo(("d",))


def test_calibration_draws_the_same_training_samples_for_a_seed(tmp_path):
    data = Twelve(batch_size=4)
    data.attach(Ids())
    context = Context(tmp_path / "out", data=data)
    first, again, other = ([b["id"] for b in context.calibration(7, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert [len(batch) for batch in first] == [4, 3]
    ids = [each for batch in first for each in batch]
    assert len(set(ids)) == 7
    assert all(each.startswith("train") for each in ids)
    with pytest.raises(ValueError, match="13 of 12"):
        context.calibration(13, 0)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: MergeAtCheckpoint(Average(), "stream"), "sources=stream merges models one after the other"),
        (lambda: MergeAtCheckpoint(Average(), base="before"), "base=before is the checkpoint before"),
        (lambda: Checkpoints(), "give last or best"),
        (lambda: Checkpoints(last=2, best=2), "give last or best"),
        (lambda: Checkpoints(last=0), "at least 1"),
        (lambda: Checkpoints(best=2, monitor="train/loss", greedy=True), "scores on the validation split"),
        (lambda: MergeAtCheckpoint(Average(), Checkpoints(best=2, greedy=True), weights=[1, 2]), "leave out weights"),
        (lambda: MergeAtCheckpoint(ModelStock(), Checkpoints(best=2, greedy=True)), "ModelStock needs 2"),
        (lambda: MergeAtCheckpoint(Average(), Checkpoints(last=3), weights=[1, 2]), "2 weights for 3 checkpoints"),
        (lambda: MergeAtCheckpoint(Opcm(), "stream", weights=[1.0]), "leave out weights"),
        (lambda: MergeAtCheckpoint(Average(), name="a/b"), "no plain name"),
        (lambda: Boundary([]), "at least one step"),
        (lambda: Boundary([Negate("a")], every=0), "every=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(make, part):
    with pytest.raises(ValueError, match=part):
        make()


@pytest.mark.parametrize(
    ("boundaries", "part"),
    [
        ([Boundary([Negate("a")], evaluate=None)], "Net has no stages"),
        ([Boundary([Negate("a")], "fit_end")], "cannot be scored within a fit"),
        ([Boundary([Negate("a"), Negate("a")], "fit_end", evaluate=None)], "two steps are called 'a'"),
        (
            [Boundary([Negate("a")], "fit_end", evaluate=None)] * 1 + [Boundary([Negate("a")], "checkpoint")],
            "two steps",
        ),
        (
            [Boundary([Negate("a"), MergeAtCheckpoint(Average(), Checkpoints(last=2))], "fit_end", evaluate=None)],
            "not what a has made: give it a Boundary of its own",
        ),
        ([Boundary([MergeAtCheckpoint(Average())], "fit_end", evaluate=None)], "Net has no stages: set sources"),
        (
            [Boundary([MergeAtCheckpoint(TaskArithmetic(), Checkpoints(last=2))], "fit_end", evaluate=None)],
            "TaskArithmetic needs a base: set base to before",
        ),
        (
            [Boundary([MergeAtCheckpoint(Average(), Checkpoints(last=3))], "fit_end", evaluate=None)],
            "set --checkpoint.save_top_k 3",
        ),
        (
            [Boundary([MergeAtCheckpoint(Average(), Checkpoints(best=2))], "fit_end", evaluate=None)],
            "set --checkpoint.monitor val/accuracy --checkpoint.mode max",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(boundaries, part, tmp_path):
    with pytest.raises(MisconfigurationException, match=part):
        trainer_of(tmp_path, *boundaries, top=2).fit(Net(), data())
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_without_checkpoints_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, Boundary([Negate("a")], "fit_end", evaluate=None))
    trainer.callbacks.pop()
    with pytest.raises(MisconfigurationException, match=r"set trainer\.enable_checkpointing"):
        trainer.fit(Net(), data())


def test_the_settings_of_a_step_do_not_change_as_it_merges():
    merger = Ties(density=0.2)
    state = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}
    before = described(merger)
    merger([state, {"w": state["w"] + 1}], {"w": torch.zeros(4, 3)})
    assert described(merger) == before
    assert before["class_path"] == "fulgurite.methods.merging.ties.Ties"
    assert before["init_args"]["density"] == 0.2


def test_settings_are_plain_values():
    opcm = Opcm(exclude=["embed"], state=OpcmState((1.0,), 1.0))
    assert described(opcm)["init_args"] == {
        "alpha": 0.5,
        "exclude": ["embed"],
        "before": {
            "class_path": "fulgurite.methods.merging.opcm.OpcmState",
            "init_args": {"norms": [1.0], "lam": 1.0},
        },
        "keep": False,
    }


def test_what_a_context_was_not_given_is_said(tmp_path):
    context = Context(tmp_path / "out")
    for ask in (lambda: context.build(tmp_path), lambda: context.calibration(1, 0), lambda: context.evaluate(tmp_path)):
        with pytest.raises(LookupError, match="run it in a fit, or give Context"):
            ask()
