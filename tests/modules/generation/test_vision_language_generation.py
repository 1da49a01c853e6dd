import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.generation_losses import IGNORED
from fulgurite.modules.generation_tasks import sampled_answers
from fulgurite.samples import DataError
from fulgurite.samples.dataset import drawn_samples

NO_CAPTIONS = ("vqa", "nlvr2")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_fit_and_a_test_of_several_tasks(kind, kit, tmp_path):
    found = kit.fitted_and_tested(
        tmp_path, lambda: kit.module(kind), lambda: kit.toys(NO_CAPTIONS), gradient_clip_val=5.0
    )
    assert len(found["losses"]) == 6
    assert all(len(set(tasks)) == 1 for tasks in found["tasks"])
    assert all(0 < loss < 20 for loss in found["losses"])
    logged = found["logged"]
    for name in ("accuracy/vqa", "accuracy/vqa/colour", "accuracy/nlvr2", "score"):
        assert 0 <= logged[f"val/{name}"] <= 100
        assert 0 <= logged[f"test/{name}"] <= 100
    assert logged["test/score"] == pytest.approx((logged["test/accuracy/vqa"] + logged["test/accuracy/nlvr2"]) / 2)
    assert len(found["answers"]) == 10
    assert {a for (domain, _), a in found["answers"].items() if domain == "nlvr2 toys"} <= {"true", "false"}
    assert all("backbone" not in name for name in found["gradients"])


def test_colours_are_learned(kit, tmp_path):
    data = kit.toys(("vqa",), {**kit.SIZES, "train": 24}, batch_size=8)
    model = kit.module(adapters=None, optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-2))
    trainer = kit.trainer_of(tmp_path, max_epochs=25, limit_val_batches=0, gradient_clip_val=1.0)
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    assert result["test/accuracy/vqa"] == 100
    rows = [row for batch in trainer.predict(model, datamodule=data) for row in batch]
    assert [(row["id"], row["task"], row["answer"]) for row in rows] == [
        ("vqa toys/predict0", "vqa", "red"),
        ("vqa toys/predict1", "vqa", "green"),
    ]
    (table, examples) = model.report_sections(data.samples("test"))
    assert "accuracy" in table.html
    assert "what colour is it?" in examples.html
    assert "✓ red" in examples.html


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_choice_is_by_the_first_token_that_tells_the_answers_apart(kind, kit):
    model = kit.module(kind).eval()
    data = kit.toys(("nlvr2",))
    data.attach(model.collator("test"))
    (batch,) = list(data.loader("test", data.samples("test")[:4]))
    answers = model.write(batch)
    token = {word: model.backbone.target_batch([word])["targets"] for word in ("true", "false")}
    place = 1  # behind the token with which this tokenizer begins every text
    for b, answer in enumerate(answers):
        each = {}
        for word, ids in token.items():
            with torch.no_grad():
                logits = model.backbone(batch, ids.expand(4, -1))
            each[word] = logits[b, place, ids[0, place]].item()
        assert answer == max(each, key=each.get)


def test_the_loss_of_each_task_written_out(kit, tmp_path):
    """The first step of each task, from the backbone's own logits before anything has trained."""
    model = kit.module(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    data = kit.toys(("vqa", "nlvr2"), batch_sizes=[5, 10])
    steps = kit.Steps()
    kit.trainer_of(tmp_path, callbacks=[steps], limit_val_batches=0).fit(model, datamodule=data)
    for step, batch in enumerate(data.train_dataloader()):
        texts, scores = sampled_answers(batch, 0, 0)
        expected = []
        for b, (text, score) in enumerate(zip(texts, scores)):
            one = {k: v[b : b + 1] for k, v in batch.items()}
            targets = model.backbone.target_batch([text])["targets"]
            with torch.no_grad():
                logits = model.backbone(one, targets)
            loss = torch.nn.functional.cross_entropy(logits[0], targets[0])
            expected.append(loss * (score if batch["task"][b] == "vqa" else 1))
        assert steps.losses[step] == pytest.approx(float(sum(expected) / len(expected)), rel=1e-4)


def test_what_is_learned_is_cut_as_each_task_says_in_a_batch_of_several(kit):
    targets = kit.module().targets(["red " * 50] * 3, ["vqa", "gqa", "caption"])
    assert (targets != IGNORED).sum(1).tolist() == [10, 52, 40]  # with a token before and one behind the words
    assert [row[row != IGNORED][-1].item() for row in targets] == [kit.WORDS["eos_token_id"]] * 3


def test_adapters_per_task_get_each_sample_s_task(kit, tmp_path):
    def per_task():
        bottleneck = functools.partial(Bottleneck, reduction=4)
        kind = functools.partial(PerTask, kind=bottleneck, tasks=["vqa", "nlvr2"])
        return [Placement(["feed_forward_output"], kind)]

    model = kit.module(adapters=per_task, task_prefixes=False)
    with torch.no_grad():
        for parameter in model.bank.parameters_of("live"):
            parameter.normal_(std=0.5)
    data = kit.toys(NO_CAPTIONS, batches="mixed")
    data.attach(model.collator("fit"))
    batch = next(iter(data.train_dataloader()))
    assert len(set(batch["task"])) == 2
    targets = model.targets(["red"] * 4, batch["task"])
    mixed = model(batch, targets)
    for b in range(4):
        alone = model({k: v[b : b + 1] for k, v in batch.items()}, targets[b : b + 1])
        torch.testing.assert_close(mixed[b], alone[0], rtol=1e-4, atol=1e-4)
        other = {**{k: v[b : b + 1] for k, v in batch.items()}, "task": [({*NO_CAPTIONS} - {batch["task"][b]}).pop()]}
        assert not torch.allclose(model(other, targets[b : b + 1])[0], mixed[b])
    with pytest.raises(DataError, match=r"tasks \['gqa'\], and the adapters are those of \['vqa', 'nlvr2'\]"):
        kit.trainer_of(tmp_path).fit(model, datamodule=kit.toys(("gqa", "vqa")))


@pytest.mark.parametrize("adapters", ["bottleneck", "none"])
def test_resume_is_exact(adapters, kit, tmp_path):
    given = {"bottleneck": kit.bottlenecks, "none": None}[adapters]
    start = kit.module(adapters=given)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False)
    options = {"limit_val_batches": 0, "enable_checkpointing": True, "max_epochs": 2}
    whole, whole_steps = copy.deepcopy(start), kit.Steps()
    data = lambda: kit.toys(NO_CAPTIONS)  # noqa: E731
    kit.trainer_of(tmp_path, callbacks=[saver, whole_steps], **options).fit(whole, datamodule=data())
    for step in (4, 6):
        resumed, steps = copy.deepcopy(start), kit.Steps()
        trainer = kit.trainer_of(tmp_path, callbacks=[steps], **options)
        trainer.fit(resumed, datamodule=data(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert steps.losses == whole_steps.losses[step:]
        for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters()):
            assert torch.equal(ours, theirs), name


def test_the_backbone_itself_trains_where_adapters_are_null(kit, tmp_path):
    model = kit.module(adapters=None, frozen=[r"language\.shared\.weight"])
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    trainer = kit.trainer_of(tmp_path, limit_val_batches=0)
    trainer.fit(model, datamodule=kit.toys(NO_CAPTIONS))
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    assert "language.shared.weight" not in moved
    assert "language.encoder.block.0.layer.0.SelfAttention.q.weight" in moved
    assert model.self_contained
    assert any(name.startswith("backbone.") for name in model.state_dict())
    with pytest.raises(ValueError, match="adapters is empty"):
        kit.module(adapters=list)
    with pytest.raises(ValueError, match="frozen is for training"):
        kit.module(frozen=["x"])


def test_a_ladder_is_pruned_by_the_squared_gradients_of_the_backbone_on_text_alone(kit, tmp_path):
    def ladder():
        points = ["embedded", "encoder_block", "decoder_block", "read_out"]
        return [Placement(points, functools.partial(LadderSide, reduction=2, init="fisher", samples=5))]

    model = kit.module(adapters=ladder, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    data = kit.toys(NO_CAPTIONS)
    kit.trainer_of(tmp_path, limit_val_batches=0, limit_train_batches=1).fit(model, datamodule=data)
    plain, collator = kit.module(adapters=None), model.collator("fit")
    sums = {name: torch.zeros_like(p) for name, p in plain.backbone.named_parameters()}
    for sample in drawn_samples(data.samples("train"), 5, 0):
        batch = collator([sample])
        (text,), (score,) = sampled_answers(batch, 0, 0)
        del batch["features"], batch["picture"]
        targets = plain.backbone.target_batch([text])["targets"]
        plain.zero_grad()
        loss = torch.nn.functional.cross_entropy(plain.backbone(batch, targets)[0], targets[0])
        (loss * (score if sample.task == "vqa" else 1)).backward()
        for name, parameter in plain.backbone.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    fresh = kit.module(adapters=ladder)
    (expected,) = fresh.bank.adapters_of("live").values()
    copy_pruned(expected, fresh.backbone, fresh.backbone.spec, sums)
    for name in ("live", "initial"):
        (own,) = model.bank.adapters_of(name).values()
        for side, theirs in zip(own.stacks, expected.stacks):
            for ours, tensor in zip(side.blocks.parameters(), theirs.blocks.parameters()):
                torch.testing.assert_close(ours, tensor)
