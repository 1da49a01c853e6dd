"""Attacks on items: each by its own settings and its own draws, and what they need is asked for at once."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.rephrasing import QuestionRephrase
from fulgurite.methods.unlearning.attacks.wrapped import Relearning
from fulgurite.methods.unlearning.objectives.error_injection import ErrorInjection
from fulgurite.samples import DataError

spec = importlib.util.spec_from_file_location("unlearning_kit", Path(__file__).with_name("conftest.py"))
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)


def test_an_attack_within_another_is_not_mistaken_for_one_of_its_name():
    """The whole vocabulary holds every answer, its likeliest token is none here."""
    size = kit.LLAMA["vocab_size"]
    module = kit.unlearning(
        attacks=[HeadProjection([4], k=size), Relearning(HeadProjection([4], k=1))], others=0, steps=1
    )
    (row,) = kit.rows_of(module, kit.ToyFacts((0,), eval_batch_size=5)).values()
    assert list(row["before"]["attacks"].values()) == [1 / size, 0.0]


def test_an_attacker_does_not_begin_where_the_defence_began():
    module = kit.unlearning()
    assert module.seeds([kit.item(0)], "edit") != module.seeds([kit.item(0)], "relearn")


def test_items_deleted_one_after_the_other_need_no_attack_on_hidden_states(tmp_path):
    asking = [QuestionRephrase(questions=1, samples=1, max_new_tokens=1)]
    module = kit.unlearning(ErrorInjection(), mode="joint", attacks=asking)
    trainer = kit.trainer(default_root_dir=tmp_path)
    trainer.fit(module, datamodule=kit.ToyFacts((0, 1), batch_size=2, in_order=True, repeats=2))
    assert trainer.global_step == 2
    assert not any(name.startswith("deleted") for name in trainer.callback_metrics)


def test_the_last_item_that_lacks_a_question_is_named_before_anything_is_computed():
    class Short(kit.ToyFacts):
        def read(self, split):
            *samples, last = super().read(split)
            return [*samples, replace(last, fact=replace(last.fact, rephrased_questions=("say it?",)))]

    module = kit.unlearning(attacks=[QuestionRephrase(questions=2)])
    module.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(DataError, match="item '4' of toys has 1 rephrased questions"):
        kit.rows_of(module, Short(eval_batch_size=1))


def test_blocks_that_recompute_cannot_be_edited_item_by_item(monkeypatch):
    plain = kit.backbone

    def recomputing():
        backbone = plain()
        backbone.recompute = True
        return backbone

    monkeypatch.setattr(kit, "backbone", recomputing)
    with pytest.raises(ValueError, match=r"recompute=true .* set mode: joint without Relearning"):
        kit.unlearning()
    kit.unlearning(mode="joint")
