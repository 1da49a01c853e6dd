"""Pairs of pictures and captions in JSON lines: how they are drawn, and what is refused by file and line."""

import json
import re

import pytest

from fulgurite.datamodules.picture_pairs import drawn_pairs, read_pairs
from fulgurite.samples.errors import DataError


@pytest.fixture
def file(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [{"image": f"in/{number}.png", "text": f" caption {number} ", "id": number} for number in range(6)]
    for row in rows:
        (tmp_path / row["image"]).write_bytes(b"")
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    return tmp_path / "pairs.jsonl"


def test_pairs_are_drawn_without_replacement_and_paths_are_relative_to_the_file(file):
    drawn = drawn_pairs(file, 6, 0)
    assert {pair.caption for pair in drawn} == {f"caption {number}" for number in range(6)}
    for pair in drawn:
        number = int(pair.caption[-1])
        assert pair.picture.path == file.parent / "in" / f"{number}.png"
        assert pair.where == f"{file}, line {2 * number + 1}"
    assert drawn_pairs(file, 3, 0) == drawn[:3]
    assert drawn_pairs(file, 6, 1) != drawn


def test_a_bad_line_is_one_message_with_its_number(file, tmp_path):
    good = file.read_text().splitlines()[0]
    for line, message in {
        "{": "not JSON",
        "[]": "expected an object",
        '{"text": "a"}': "the key 'image' is missing or empty",
        '{"image": "in/0.png", "text": " "}': "the key 'text' is missing or empty",
        '{"image": "in/0.png", "text": ["a"]}': "the key 'text' is missing or empty",
        '{"image": "0.png", "text": "a"}': f"no picture lies at {tmp_path / '0.png'}",
    }.items():
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(DataError, match=f"line 2.*{re.escape(message)}"):
            drawn_pairs(file, 1, 0)
    with pytest.raises(DataError, match="No such file or directory; --pairs"):
        read_pairs(tmp_path / "missing.jsonl")
    file.write_text(good)
    with pytest.raises(DataError, match="holds 1 pairs, and 2 are wanted"):
        drawn_pairs(file, 2, 0)
