"""A run cannot be continued in a way that would overwrite a finished stage."""

import pytest

from fulgurite.checkpoints import MismatchError
from fulgurite.modules.facts import check_epochs, read_facts
from fulgurite.samples import DataError, Stage


def stages(*epochs):
    return [Stage(f"s{i}", (f"s{i}",), e, 3) for i, e in enumerate(epochs)]


def test_other_epochs_of_a_stage_that_has_begun_are_refused():
    with pytest.raises(MismatchError, match=r"\[2, 2\] epochs.*\[4, 4\]"):
        check_epochs(stages(2, 2, 2), stages(4, 4, 4), 1)
    check_epochs(stages(2, 2, 2), stages(2, 2, 5), 1)  # a stage that has not begun may change


def test_facts_of_another_module_are_refused():
    with pytest.raises(MismatchError, match="no data facts"):
        read_facts({"epoch": 1})


def test_best_epoch_without_validation_of_every_epoch_is_refused_before_training(make_module, make_data, make_trainer):
    with pytest.raises(DataError, match="every_epoch"):
        make_trainer().fit(make_module(selection="best"), datamodule=make_data(("red",), 1))
