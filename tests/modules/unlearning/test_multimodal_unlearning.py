"""Items edited, attacked and restored: independence, identity, figures and errors."""

import functools
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.wrapped import Relearning
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.methods.unlearning.edits.whole_weight import WholeWeightEdit
from fulgurite.methods.unlearning.objectives.empty_response import EmptyResponse
from fulgurite.methods.unlearning.objectives.error_injection import ErrorInjection
from fulgurite.methods.unlearning.objectives.head_projection import HeadProjectionDefence
from fulgurite.methods.unlearning.objectives.input_rephrasing import InputRephrasing
from fulgurite.methods.unlearning.objectives.npo import NPO
from fulgurite.methods.unlearning.objectives.retain import RetainKL
from fulgurite.methods.unlearning.objectives.rmu import RMU
from fulgurite.modules.edited_state import EditedState
from fulgurite.samples import DataError

spec = importlib.util.spec_from_file_location("unlearning_kit", Path(__file__).with_name("conftest.py"))
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)


def test_items_do_not_depend_on_their_order_or_on_each_other(full_rows):
    _, together = full_rows
    module = kit.unlearning(attacks=kit.attacks())
    apart = kit.rows_of(module, kit.ToyFacts(order=(3, 1, 4, 0, 2), eval_batch_size=2))
    assert list(apart) == ["3", "1", "4", "0", "2"]
    for name, row in together.items():
        kit.assert_same(apart[name], row, name)


def test_the_backbone_is_the_same_to_the_bit_after_every_item(full_rows):
    module, _ = full_rows
    assert digest_of_state(module.backbone.state_dict()) == digest_of_state(kit.backbone().state_dict())
    assert not any(parameter.requires_grad for parameter in module.backbone.parameters())


def test_every_item_has_every_figure_and_the_edit_erases(full_rows):
    module, rows = full_rows
    titles = [attack.title for attack in module.attacks]
    for row in rows.values():
        assert row["after"]["answer"]["question"] < row["before"]["answer"]["question"]
        for when in ("before", "after"):
            assert list(row[when]["attacks"]) == titles
            assert len(row[when]["layers"]) == 5
            assert [len(right) for right in row[when]["right"].values()] == [2, 2, 1]
    figures = module.test_results["figures"]
    share = sum(row["after"]["attacks"][titles[0]] > 0 for row in rows.values()) / 5
    assert figures["success/head_projection"] == pytest.approx(100 * share)
    assert figures["budget/question_rephrase"] == 4
    mean = sum(row["after"]["layers"][4] for row in rows.values()) / 5
    assert module.test_results["layers"]["after"][4] == pytest.approx(mean)


def test_an_answer_of_several_tokens_is_no_part_of_its_prompt(full_rows):
    """Its probability is the product of those of its tokens, each behind the prompt and the tokens before it."""
    module, _ = full_rows
    item = kit.item(2)
    labels = module.labels_of(["very blue"])
    batch, state = module.encoded([item]), EditedState(module.bank, module.site)
    assert labels.shape == (1, 2)
    assert not set(labels[0].tolist()) & set(batch["text"][0].tolist())
    nobody = torch.zeros(1, dtype=torch.long)
    first = module.lens(batch, [4])[4][0, labels[0, 0]]
    second = module.lens_after(batch, labels[:, :1], [4], state, nobody)[4][0, labels[0, 1]]
    found = module.scored([item], ["very blue"], nobody, state)["log_probability"]
    assert float(found) == pytest.approx(float((first * second).log()), rel=1e-4)


def test_a_model_that_knows_nothing_is_no_success():
    module = kit.unlearning(attacks=[HeadProjection([4], k=1)])
    with pytest.warns(UserWarning, match="none of the tested items is answered right before"):
        rows = kit.rows_of(module)
    assert module.test_results["figures"]["answered_before"] == 0
    pages = [section.html for section in module.report_sections([])]
    assert "no attack found it" not in "".join(pages)
    assert "".join(pages).count("not found before either") == len(rows)


def test_the_lens_of_the_last_layer_is_the_probability_of_one_token(full_rows):
    """Of items whose answer is one token."""
    _, rows = full_rows
    single = [row for row in rows.values() if " " not in row["gold"]]
    assert len(single) == 4
    for row in single:
        assert row["after"]["layers"][4] == pytest.approx(row["after"]["answer"]["question"], rel=1e-4)


def test_no_step_changes_nothing_and_head_projection_finds_what_is_written():
    module = kit.unlearning(WholeScore(), steps=1, attacks=[HeadProjection([4], k=1)], answer_tokens=1)
    for row in kit.rows_of(module).values():
        before, after = dict(row["before"]), dict(row["after"])
        kit.assert_same(after, before)


class WholeScore(EmptyResponse):
    """An objective without any gradient."""

    def __call__(self, views, references):
        terms = super().__call__(views, references)
        return replace(terms, totals=0 * terms.totals)


@pytest.mark.parametrize(
    ("objective", "options", "rises"),
    [
        (ErrorInjection(), {}, "target"),
        (EmptyResponse("bird"), {}, "target"),
        (HeadProjectionDefence([3, 4], k=100), {}, None),
        (InputRephrasing(questions=1), {}, None),
        (NPO(), {"retain": RetainKL()}, None),
        (RMU(2), {}, None),
        (ErrorInjection(), {"edit": WholeWeightEdit}, "target"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else None,
)
def test_objectives_and_edits_are_swapped_by_one_option(objective, options, rises):
    module = kit.unlearning(objective, **options)
    for row in kit.rows_of(module).values():
        if rises is None:
            assert row["target"] is None
        else:
            assert row["after"][rises]["question"] > row["before"][rises]["question"]
    assert math.isfinite(module.test_results["figures"]["target"])


def test_enough_stops_an_item_by_itself():
    going = kit.rows_of(kit.unlearning(ErrorInjection()))
    stopped = kit.rows_of(kit.unlearning(ErrorInjection(), enough=1e9))
    for name, row in stopped.items():
        kit.assert_same(row["after"]["target"], row["before"]["target"])
        assert going[name]["after"]["target"] != going[name]["before"]["target"]


def test_one_edit_for_all_is_trained_by_fit_and_attacked_by_test(tmp_path):
    module = kit.unlearning(ErrorInjection(), mode="joint", retain=RetainKL())
    trainer = kit.trainer(max_epochs=3, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=kit.ToyFacts(batch_size=5))
    digest = digest_of_state(module.backbone.state_dict())
    assert digest == digest_of_state(kit.backbone().state_dict())
    assert set(module.state_dict()) == {
        f"bank.sets.{name}.language/model/layers/1/mlp/down_proj.{part}"
        for name in ("initial", "live")
        for part in ("down", "up")
    }
    rows = kit.rows_of(module)
    assert all(row["after"]["target"]["question"] > row["before"]["target"]["question"] for row in rows.values())


def test_an_edit_is_back_in_its_ball_before_anything_is_saved(tmp_path):
    seen = []

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            (edit,) = module.bank.adapters_of("live").values()
            seen.append(float(edit.delta.detach().abs().max()))

    edit = functools.partial(WholeWeightEdit, ball=1e-3)
    module = kit.unlearning(ErrorInjection(), mode="joint", edit=edit)
    kit.trainer(max_epochs=2, callbacks=[Saving()], default_root_dir=tmp_path).fit(module, kit.ToyFacts(batch_size=5))
    assert seen == pytest.approx([1e-3, 1e-3])


def test_accumulated_gradients_are_refused(tmp_path):
    module = kit.unlearning(mode="joint")
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        kit.trainer(accumulate_grad_batches=2, default_root_dir=tmp_path).fit(module, kit.ToyFacts(batch_size=2))


def test_a_fit_asks_the_model_before_the_edit_once(tmp_path):
    """NPO at the start is (2 / beta) log 2; the losses are those of a reference that is passed in every step."""

    class Asking(NPO):
        keeps_nll = False

    losses = []
    for kind in (NPO, Asking):
        torch.manual_seed(0)
        module = kit.unlearning(kind(beta=0.5), mode="joint", edit=functools.partial(LowRankEdit, dropout=0.0))
        calls = []
        module.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        seen = kit.Losses()
        trainer = kit.trainer(max_epochs=4, default_root_dir=tmp_path, callbacks=[seen])
        trainer.fit(module, datamodule=kit.ToyFacts(batch_size=5))
        losses.append(seen.losses)
        assert len(calls) == (1 + 4 if kind is NPO else 2 * 4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(2 / 0.5 * math.log(2))
    assert losses[0][-1] < losses[0][0]


def test_a_question_that_is_asked_often_is_encoded_once(full_rows):
    module, _ = full_rows
    seen = []
    hook = module.backbone.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    one, two = kit.item(0), kit.item(1)
    rows = [one, two, one, module.question(one, "what else?"), module.question(one, one.question, two.image), one]
    found = module.encoded(rows)
    hook.remove()
    assert seen == [4]
    for number, row in enumerate(rows):
        alone = module.encoded([row])
        assert torch.equal(found["features"][number], alone["features"][0])
        length = alone["text"].shape[1]
        assert torch.equal(found["text"][number, :length], alone["text"][0])


def test_rmu_runs_no_block_behind_its_own():
    module = kit.unlearning(RMU(1), steps=2)
    called = []
    for number, block in enumerate(module.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: called.append((number, torch.is_grad_enabled())))
    kit.rows_of(module)
    assert {number for number, graded in called if graded} == {0, 1}


def test_head_projection_at_the_last_layer_takes_what_is_written():
    module = kit.unlearning(attacks=[HeadProjection([4], k=1)], answer_tokens=1)
    for row in kit.rows_of(module).values():
        for when in ("before", "after"):
            first = module.backbone.tokenizer.decode(module.labels_of([row["gold"]])[0, :1])
            assert (row[when]["attacks"]["head projection"] > 0) == (row[when]["written"] == first)


def test_items_deleted_one_after_the_other_are_attacked_after_their_own_steps_and_after_all(tmp_path):
    attack = HeadProjection([4], k=8)
    module = kit.unlearning(ErrorInjection(), mode="joint", attacks=[attack])
    order, found = [], []
    module.read_out_now = lambda samples, real=module.read_out_now: (
        order.append([sample.id for sample in samples]) or found.append(real(samples)[attack.title]) or real(samples)
    )
    trainer = kit.trainer(default_root_dir=tmp_path)
    trainer.fit(module, datamodule=kit.ToyFacts(batch_size=2, in_order=True, repeats=3))
    assert order == [["0", "1"], ["2", "3"], ["4"], ["0", "1", "2", "3", "4"]]
    assert trainer.global_step == 9
    then, now = [share > 0 for part in found[:-1] for share in part], [share > 0 for share in found[-1]]
    logged = trainer.callback_metrics
    assert logged["deleted/success_then/head_projection"] == pytest.approx(100 * sum(then) / 5)
    assert logged["deleted/success_now/head_projection"] == pytest.approx(100 * sum(now) / 5)


def test_what_cannot_be_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"independent edits every item by itself.*run test in place of fit"):
        kit.trainer().fit(kit.unlearning(), datamodule=kit.ToyFacts(batch_size=5))
    with pytest.raises(ValueError, match=r"no layer 9; this model has 0 .* to 4"):
        kit.unlearning(attacks=[HeadProjection([9])])
    with pytest.raises(ValueError, match=r"objective\.layers=\[2, 7\]: there is no layer 7"):
        kit.unlearning(HeadProjectionDefence([2, 7]))
    with pytest.raises(ValueError, match="no block 4; the model has 0 to 3"):
        kit.unlearning(RMU(4))
    with pytest.raises(ValueError, match="matches 4 layers"):
        kit.unlearning(edited=r"language\.model\.layers\.\d\.mlp\.down_proj")
    with pytest.raises(LookupError, match=r"model\.init_args\.edited: .* matches no module"):
        kit.unlearning(edited="nothing")
    with pytest.raises(ValueError, match="attacks is empty"):
        kit.unlearning(attacks=[])
    with pytest.raises(ValueError, match=r"mode=joint attacks what a fit has left.*--ckpt_path"):
        kit.rows_of(kit.unlearning(mode="joint"))
    with pytest.raises(ValueError, match="two of the name 'head projection'"):
        kit.unlearning(attacks=[HeadProjection([4]), HeadProjection([3])])


def with_items(change):
    class Changed(kit.ToyFacts):
        def read(self, split):
            return [change(sample) for sample in super().read(split)]

    return Changed(eval_batch_size=5)


def test_items_that_lack_something_are_named_before_anything_is_computed():
    with pytest.raises(DataError, match="item '0' of toys has no neighbours"):
        kit.rows_of(kit.unlearning(), with_items(lambda s: replace(s, fact=replace(s.fact, neighbour_questions=()))))
    with pytest.raises(DataError, match="'fact'"):
        kit.rows_of(kit.unlearning(), with_items(lambda s: replace(s, fact=None)))
    relearning = kit.unlearning(attacks=[Relearning(HeadProjection([4]), source="neighbours", pairs=3)])
    with pytest.raises(DataError, match="item '0' has fewer than 3 neighbours samples"):
        kit.rows_of(relearning)


def test_a_loss_that_is_not_finite_names_the_item():
    class Spoilt(EmptyResponse):
        def __call__(self, views, references):
            terms = super().__call__(views, references)
            return replace(terms, totals=terms.totals + torch.tensor([0.0, math.inf, 0.0, 0.0, 0.0]))

    with pytest.raises(DataError, match="the loss of item '1' is not finite in step 0"):
        kit.rows_of(kit.unlearning(Spoilt()))
