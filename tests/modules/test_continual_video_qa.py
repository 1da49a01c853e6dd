import pytest
import torch
from lightning.pytorch import Callback

from fulgurite.checkpoints.errors import MismatchError
from fulgurite.modules.continual_video_qa import ContinualVideoQA, evaluation_mode
from fulgurite.modules.video_qa import ParamGroup, VideoQA


def values(module, name):
    return {key: p.detach().clone() for key, p in module.bank.sets[name].named_parameters()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


class Watch(Callback):
    """The live set before the first step of every epoch, and how much optimizer state there is."""

    def __init__(self):
        self.live, self.moments = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.live.append(values(pl_module, "live"))
            self.moments.append(len(trainer.optimizers[0].state))


@pytest.fixture(scope="module")
def _cache():
    return {}


@pytest.fixture
def trained(_cache, make_module, make_data, make_trainer):
    """One full run, shared by the tests that only look at it."""
    if not _cache:
        module, data, watch = make_module(), make_data(), Watch()
        frozen = {k: v.clone() for k, v in module.backbone.state_dict().items()}
        make_trainer(callbacks=[watch]).fit(module, datamodule=data)
        _cache.update(module=module, data=data, watch=watch, frozen=frozen)
    return _cache


def test_every_stage_starts_from_the_tensors_of_the_one_before(trained):
    module, live = trained["module"], trained["watch"].live
    assert same(live[0], values(module, "initial"))
    assert same(live[2], values(module, "red"))
    assert same(live[4], values(module, "green"))
    assert same(values(module, "live"), values(module, "blue"))
    assert not same(values(module, "red"), values(module, "green"))


def test_optimizer_state_is_fresh_in_every_stage_and_holds_the_live_set_alone(trained):
    assert [m > 0 for m in trained["watch"].moments] == [False, True, False, True, False, True]
    module = trained["module"]
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {f"bank.sets.live.{key}" for key in values(module, "live")}


def test_nothing_of_the_backbone_changes_or_holds_gradients(trained):
    module = trained["module"]
    for key, value in module.backbone.state_dict().items():
        assert torch.equal(value, trained["frozen"][key]), key
    assert all(p.grad is None and not p.requires_grad for p in module.backbone.parameters())
    assert not any(key.startswith("backbone") for key in module.state_dict())


def test_router_holds_the_two_pass_means_of_the_frozen_model(trained):
    module, data = trained["module"], trained["data"]
    collate = module.collator("fit")
    for row, domain in enumerate(("red", "green", "blue")):
        samples = [s for s in data.samples("train") if s.domain == domain]
        with torch.no_grad(), evaluation_mode(module):
            parts = module(collate(samples), "initial").routing
        mean = torch.cat([p.double() for p in parts], -1).mean(0)
        torch.testing.assert_close(module.router.centroids[row], mean, rtol=1e-5, atol=1e-6)
        unit = torch.cat([torch.nn.functional.normalize(p.double(), dim=-1) for p in parts], -1).mean(0)
        torch.testing.assert_close(module.second_router.centroids[row], unit, rtol=1e-5, atol=1e-6)
    assert module.router.counts.tolist() == [20, 20, 20]


def test_one_hot_weights_give_the_logits_of_that_stage(trained):
    module, data = trained["module"], trained["data"]
    batch = module.collator("test")(data.samples("test")[:5])
    names = ["initial", "red", "green", "blue"]
    with torch.no_grad(), evaluation_mode(module):
        for column, name in enumerate(names):
            weights = torch.zeros(5, 4)
            weights[:, column] = 1
            torch.testing.assert_close(
                module(batch, weights, names).logits, module(batch, name).logits, rtol=1e-5, atol=1e-5
            )


def test_matrix_of_the_last_adapter_is_what_each_stage_measured(trained, make_module, make_data, make_trainer):
    module, data = trained["module"], trained["data"]
    make_trainer().test(module, datamodule=data, verbose=False)
    matrix = torch.tensor(module.test_results["modes"]["last"]["matrix"])
    stopped = make_module()
    trainer = make_trainer(max_epochs=4)
    trainer.fit(stopped, datamodule=make_data())
    assert same(values(stopped, "green"), values(module, "green"))
    plain = make_module(VideoQA)
    plain.prepare(module.info, module.stages)
    plain.bank.sets["live"].load_state_dict(stopped.bank.sets["live"].state_dict())
    make_trainer().test(plain, datamodule=data, verbose=False)
    torch.testing.assert_close(torch.tensor(plain.test_results["matrix"][0]), matrix[2])


def test_every_test_question_is_counted_once_and_answered_by_every_mode(trained, make_trainer):
    module, data = trained["module"], trained["data"]
    make_trainer().test(module, datamodule=data, verbose=False)
    assert module.test_counts["dynamic"].accuracy.count.sum((1, 2)).tolist() == [21.0] * 4
    assert len({a["id"] for a in module.test_answers}) == 21
    assert set(module.test_answers[0]["answers"]) == set(module.modes)
    assert sum(sum(row) for row in module.test_results["confusion"][0]) == 21
    zero = torch.tensor(module.test_results["modes"]["zero_shot"]["matrix"])
    assert torch.equal(zero, zero[:1].expand(4, 3))
    oracle = torch.tensor(module.test_results["modes"]["oracle"]["matrix"])
    last = torch.tensor(module.test_results["modes"]["last"]["matrix"])
    assert [oracle[3, i].item() for i in range(3)] == [last[i + 1, i].item() for i in range(3)]
    assert module.test_results["modes"]["oracle"]["forgetting"] == 0


def test_stages_trained_apart_start_from_the_beginning(make_module, make_data, make_trainer):
    module, watch = make_module(start_from="initial"), Watch()
    make_trainer(callbacks=[watch]).fit(module, datamodule=make_data(("red", "green"), 1))
    assert same(watch.live[0], watch.live[1])
    assert not same(values(module, "red"), values(module, "initial"))


def test_best_epoch_is_kept_and_goes_on(make_module, make_data, make_trainer):
    class Accuracy(Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            own = trainer.callback_metrics[f"val/accuracy/{pl_module.stages[pl_module.stage].name}"].item()
            self.seen.append((pl_module.stage, own, values(pl_module, "live")))

    seen = Accuracy()
    module = make_module(selection="best", lr=0.3, mode="last")
    data = make_data(("red", "green"), 4, validate="every_epoch")
    make_trainer(callbacks=[seen]).fit(module, datamodule=data)
    for stage, name in enumerate(("red", "green")):
        tried = [(own, live) for s, own, live in seen.seen if s == stage]
        best = max(range(4), key=lambda i: (tried[i][0], -i))
        assert same(values(module, name), tried[best][1])
    assert len({own for _, own, _ in seen.seen}) > 1
    other = make_module(selection="best", lr=0.3, mode="zero_shot")  # what it answers does not change with training
    make_trainer().fit(other, datamodule=make_data(("red", "green"), 4, validate="every_epoch"))
    assert all(same(values(module, name), values(other, name)) for name in ("red", "green"))


@pytest.mark.parametrize("mode", ["last", "dynamic"])
def test_validation_at_the_end_of_a_stage_reports_what_the_stage_keeps(mode, make_module, make_data, make_trainer):
    """The kept set is the live one after the stage, so a validation of its own must find the same row."""

    class LiveAlone(Callback):
        """The row that the live set of the last epoch would give."""

        def on_validation_epoch_end(self, trainer, pl_module):
            if pl_module.ends_stage:
                self.row = pl_module.val_counts["now"].accuracy.results()["matrix"][0].tolist()

    module, alone, trainer = make_module(selection="best", lr=0.3, mode=mode), LiveAlone(), make_trainer()
    trainer.callbacks.append(alone)
    data = make_data(("red", "green"), 4, validate="every_epoch")
    trainer.fit(module, datamodule=data)
    kept = module.val_matrix[2].tolist()
    assert kept == pytest.approx([trainer.callback_metrics[f"val/accuracy/{d}"].item() for d in ("red", "green")])
    make_trainer().validate(module, datamodule=data, verbose=False)
    assert module.val_counts["now"].accuracy.results()["matrix"][0].tolist() == pytest.approx(kept)
    if mode == "last":
        assert kept != alone.row


def test_the_first_full_validation_also_measures_the_start(trained, make_module, make_data, make_trainer):
    module, data = trained["module"], trained["data"]
    assert not module.val_matrix.isnan().any()
    fresh = make_module(mode="zero_shot")
    fresh.prepare(module.info, module.stages)
    make_trainer().validate(fresh, datamodule=data, verbose=False)
    torch.testing.assert_close(fresh.val_counts["now"].accuracy.results()["matrix"][0], module.val_matrix[0])


def test_accuracy_by_kind_and_among_the_best_ten_of_a_plain_module(trained, make_module, make_data, make_trainer):
    module, data = make_module(VideoQA), make_data()
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    samples = {s.id: s for s in data.samples("test")}
    for i, domain in enumerate(module.info.domains):
        rows = [a for a in module.test_answers if a["domain"] == domain]
        right = [samples[a["id"]].answers.get(a["answers"]["last"], 0) for a in rows]
        assert module.test_results["matrix"][0][i] == pytest.approx(sum(right) / len(right))
        for k, kind in enumerate(module.info.kinds):
            own = [r for r, a in zip(right, rows) if a["kind"] == kind]
            assert module.test_results["by_kind"][i][k] == pytest.approx(sum(own) / len(own))
            assert trainer.callback_metrics[f"test/kind/{domain}/{kind}"].item() == pytest.approx(sum(own) / len(own))
    assert len(module.info.answers) <= 10
    assert trainer.callback_metrics["test/top10"].item() == 1


def test_the_configured_mode_must_be_tested(make_module):
    with pytest.raises(ValueError, match=r"'dynamic' is not among modes=\['last'\]"):
        make_module(modes=["last"])


def test_a_limit_on_the_batches_is_named_for_the_router(make_module, make_data, make_trainer, caplog):
    module = make_module()
    with caplog.at_level("INFO"):
        make_trainer(limit_train_batches=1).fit(module, datamodule=make_data(("red", "green"), 1))
    assert "red: the router learns from 1 of 3 batches" in caplog.text
    assert module.router.counts.tolist() == [8, 8]


def test_best_without_validation_is_an_error(make_module, make_data, make_trainer):
    with pytest.raises(ValueError, match="every_epoch"):
        make_trainer(limit_val_batches=0).fit(make_module(selection="best"), datamodule=make_data(("red",), 1))


def test_joint_training_is_one_stage_over_all_domains(make_module, make_data, make_trainer):
    module = make_module(mode="last", modes=["last", "zero_shot"])
    data = make_data(joint=True)
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    assert [s.name for s in module.stages] == ["all"]
    trainer.test(module, datamodule=data, verbose=False)
    assert "forgetting" not in module.test_results["modes"]["last"]
    assert torch.tensor(module.test_results["modes"]["last"]["matrix"]).shape == (2, 3)


def test_schedule_starts_afresh_in_every_stage(make_module, make_data, make_trainer):
    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    make_trainer(callbacks=[rates]).fit(make_module(), datamodule=make_data(("red", "green"), 2))
    assert len(rates.seen) == 12
    assert rates.seen[:6] == pytest.approx(rates.seen[6:])
    assert rates.seen[0] == pytest.approx(1e-2)


def test_learning_rates_by_group(make_module, make_data, make_trainer):
    module = make_module(param_groups=[ParamGroup("video_projection", 1e-4)])
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=make_data(("red",), 1))
    groups = trainer.optimizers[0].param_groups
    assert [g["initial_lr"] for g in groups] == [1e-4, 1e-2]
    assert sum(len(g["params"]) for g in groups) == len(values(module, "live"))
    with pytest.raises(LookupError, match="matches none"):
        make_trainer(max_steps=1).fit(
            make_module(param_groups=[ParamGroup("nowhere", 1e-4)]), datamodule=make_data(("red",), 1)
        )


def test_other_adapters_than_the_checkpoints_are_one_error(trained, make_module):
    module = trained["module"]
    other = make_module()
    other.prepare(module.info, module.stages)
    state = dict(module.state_dict())
    name = next(k for k in state if k.startswith("bank.sets.red"))
    state[name] = state[name].flatten()[:3]
    state["bank.sets.red.extra"] = torch.zeros(1)
    with pytest.raises(MismatchError, match=r"2 tensors[\s\S]*not in this model[\s\S]*file \(3,\)"):
        other.load_state_dict(state)


def test_other_data_than_the_checkpoints_is_one_error(trained, make_module, make_data):
    module = make_module()
    data = make_data(("red", "blue"))
    module.prepare(data.info(), data.stages())
    full = trained["data"]
    with pytest.raises(MismatchError, match=r"domains: 2 built, 3 given"):
        module.prepare(full.info(), full.stages())


def test_prediction_gives_probabilities_and_mixing_weights(trained, make_trainer):
    module, data = trained["module"], trained["data"]
    batch = module.collator("predict")([*data.samples("test")[:2], *data.samples("test")[-1:]])
    batch["counted"][1] = False
    with torch.no_grad(), evaluation_mode(module):
        rows = module.predict_step(batch, 0)
    assert [r["id"] for r in rows] == [batch["id"][0], batch["id"][2]]
    for row in rows:
        assert row["answer"] in module.info.answers
        assert 0 < row["probability"] <= 1
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)
        assert len(row["weights"]) <= 2


def test_second_router_mode_needs_a_second_router(make_module):
    with pytest.raises(ValueError, match="second_router"):
        make_module(second_router=None, mode="second_router")


def test_a_module_without_adapters_is_refused(make_module):
    with pytest.raises(ValueError, match="nothing would train"):
        VideoQA(make_module().backbone, [])


def test_evaluation_mode_restores_every_submodule(make_module):
    module = make_module(ContinualVideoQA)
    module.train()
    module.bank.eval()
    before = [m.training for m in module.modules()]
    with evaluation_mode(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == before


def test_loss_of_uncounted_repeats_is_left_out(trained, monkeypatch):
    module, data = trained["module"], trained["data"]
    collate = module.collator("fit")
    samples = data.samples("train")[:4]
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    batch = collate(samples)
    full = VideoQA.training_step(module, batch, 0)
    padded = collate([*samples, samples[0]])
    padded["counted"] = torch.tensor([True] * 4 + [False])
    torch.testing.assert_close(VideoQA.training_step(module, padded, 0), full)
