"""Files of data sets, and errors that name file, line and option."""

import pytest

from fulgurite.datamodules.files import (
    given_or_there,
    laid_out,
    listed,
    read_json,
    read_jsonl,
    read_names,
    read_text,
    read_vocabulary,
    require_root,
)
from fulgurite.samples import DataError


@pytest.fixture
def write(tmp_path):
    """Writes a file of some bytes, and gives its path."""

    def put(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_lines_are_counted_from_1_and_blank_ones_too(write):
    path = write('\ufeff{"a": 1}\n\n  \n{"a": "é"}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": "é"})]
    assert read_names(write("b\n\n a \r\nb\n")) == {"b": 1, "a": 3}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n{', r"file, line 2: not JSON \(.* at column 2\)"),
        ("{}\n[1]", "file, line 2: expected an object, got list"),
        (b"{}\n{}\n\xff", "file, line 3: not UTF-8"),
        ("[" * 100_000, "file, line 1: not JSON that can be read"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(content, said, write):
    with pytest.raises(DataError, match=said):
        list(read_jsonl(write(content)))


def test_files_and_folders_that_are_not_there_are_named_with_their_option(tmp_path, write):
    require_root(tmp_path)
    with pytest.raises(DataError, match=r"none: no such folder; .* set --data\.root"):
        require_root(tmp_path / "none")
    with pytest.raises(DataError, match=r"none: cannot read the file: .*; --data\.more names it"):
        read_text(tmp_path / "none", "--data.more names it")
    with pytest.raises(DataError, match=r"file: not JSON \(.* at line 2\)"):
        read_json(write("[1,\n}"))


def test_a_usual_file_may_be_missing_and_a_given_one_may_not(tmp_path, write):
    assert given_or_there(tmp_path, None, "file") is None
    assert given_or_there(tmp_path, "file", "file") is None
    assert given_or_there(tmp_path, "own", "file") == tmp_path / "own"
    there = write("")
    assert given_or_there(tmp_path, "file", "file") == there


def test_another_layout_is_one_error():
    assert listed((1, "a")) == [1, "a"]
    for wrong in (lambda: listed("text"), lambda: {}["key"], lambda: [][0], lambda: None.x):
        with pytest.raises(DataError, match=r"here: another layout than \[\.\.\.\]"), laid_out("here", "[...]"):
            wrong()


def test_a_vocabulary_is_a_list_or_positions(write):
    assert read_vocabulary(write('["b", "a"]')) == ("b", "a")
    assert read_vocabulary(write('{"a": 1, "b": 0}')) == ("b", "a")
    for content, said in (
        ('{"a": 1, "b": 2}', "must be 0 to 1, each once"),
        ('["a", "b", "a"]', r"answers occur twice: \['a'\]"),
        ('["a", ""]', "expected a JSON list"),
        ("[]", "expected a JSON list"),
        ('"a"', "expected a JSON list"),
    ):
        with pytest.raises(DataError, match=said):
            read_vocabulary(write(content))
