"""Fields of records about pictures, and which files they are read from."""

import pytest

from fulgurite.datamodules.gqa import Gqa
from fulgurite.datamodules.picture_task import label_of, name_of, text_of
from fulgurite.samples import DataError


def test_a_text_is_that_of_the_first_key_that_is_there_without_spaces_around_it():
    assert text_of({"question": " a? "}, ("sent", "question"), "here") == "a?"
    assert text_of({"question": "a?", "sent": "b?"}, ("sent", "question"), "here") == "b?"


def test_a_name_is_a_text_or_a_number():
    assert [name_of({"id": value}, "id", "here") for value in ("a", 0)] == ["a", "0"]
    for value in (True, " ", 1.5, None):
        with pytest.raises(DataError, match="here: the key 'id' is missing, empty or no name"):
            name_of({"id": value}, "id", "here")


def test_scores_of_answers_are_numbers_from_0_to_1():
    assert label_of({"label": {"a": 1, "b": 0.0}}, "here", needed=True) == {"a": 1.0, "b": 0.0}
    assert label_of({"label": {}}, "here", needed=True) == label_of({}, "here", needed=False) == {}
    for label in ({" ": 1.0}, {"a": True}, {"a": "1"}, {"a": -0.1}):
        with pytest.raises(DataError, match="here: 'label' needs answers with scores from 0 to 1"):
            label_of({"label": label}, "here", needed=True)


def test_files_and_domain_are_those_that_are_named(picture_root):
    data = Gqa(picture_root, val=[], domain="mine", images=["nlvr/images"], features=["GQA/a", "GQA/b"])
    assert data.samples("val") == []
    assert data.place("val") == "Gqa: no file for the split 'val'"
    assert data.info().domains == ("mine",)
    folders = ("", "GQA/a", "GQA/b", "nlvr/images")
    assert data.folders == [picture_root / folder for folder in folders]


def test_questions_about_a_picture_share_what_is_read(picture_root):
    first, second, _, other = Gqa(picture_root, feature_width=8).samples("train")[:4]
    assert first.features is second.features
    assert first.features is not other.features
