"""Windows of text: the joined tokens, places that are those of the published code, and what is refused."""

import json
import random

import pytest
import torch

from fulgurite.datamodules.text_windows import consecutive_windows, random_windows, read_texts, token_ids
from fulgurite.samples.errors import DataError


def codes(text):
    return [ord(letter) for letter in text]


def test_texts_are_joined_and_tokenized_once(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "more": 1}\n')
    seen = []
    ids = token_ids([tmp_path / "a.txt", tmp_path / "b.jsonl"], lambda text: seen.append(text) or codes(text))
    assert seen == ["one\ntwo\n\nthree\n\nfour"]
    assert ids.tolist() == codes(seen[0])


def test_what_ends_a_line_elsewhere_ends_none_of_json(tmp_path):
    texts = ["a\u2028b", "c\x85d\x0ce"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": each}, ensure_ascii=False) for each in texts))
    assert read_texts(tmp_path / "rows.jsonl") == texts


def test_random_windows_are_those_of_gptq():
    ids = torch.arange(100)
    windows = random_windows(ids, 5, 7, seed=3)
    random.seed(3)
    for window in windows:
        start = random.randint(0, 100 - 7 - 1)
        assert torch.equal(window, torch.arange(start, start + 7))
    assert not torch.equal(windows, random_windows(ids, 5, 7, seed=4))


def test_consecutive_windows_cover_all_but_a_rest():
    windows = consecutive_windows(torch.arange(23), 5)
    assert torch.equal(windows.flatten(), torch.arange(20))
    assert consecutive_windows(torch.arange(23), 5, limit=2).shape == (2, 5)
    assert consecutive_windows(torch.arange(23), 5, limit=9).shape == (4, 5)


def test_what_is_too_short_or_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="7 tokens of text are too few"):
        random_windows(torch.arange(7), 1, 7, 0)
    with pytest.raises(DataError, match="too few for a window of 5"):
        consecutive_windows(torch.arange(4), 5)
    with pytest.raises(DataError, match=r"cannot read.*; --text and --evaluate name it"):
        read_texts(tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(tmp_path / "binary.txt")
    for line, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "an object"),
        ('{"text": 1}', "field 'text'"),
    ):
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(DataError, match=f"line 2.*{message}"):
            read_texts(tmp_path / "rows.jsonl")
