import math
import time

import pytest
import yaml

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.yaml_loader import MAX_BYTES, load_file, load_text

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)

HOSTILE = {
    "python tag": (b"a: !!python/object/apply:os.system [echo]", "tag", 1),
    "own tag": (b"a: 1\nb: !thing {}", "tag", 2),
    "duplicate key": (b"a: 1\nb: {c: 1}\na: 2", "'a' appears twice", 3),
    "nested duplicate": (b"a:\n  b: 1\n  b: 2", "'b' appears twice", 3),
    "alias bomb": (BOMB.encode(), "values", None),
    "alias to itself": (b"a: &x [*x]", "*x", 1),
    "unknown alias": (b"a: *nothing", "nothing", 1),
    "deep flow": (b"a: " + b"[" * 10_000 + b"]" * 10_000, "nest", 1),
    "deep block": (b"".join(b" " * n + b"a:\n" for n in range(900)), "nested deeper", 51),
    "huge": (b"a: " + b"x" * MAX_BYTES, "bytes", None),
    "huge scalar, cut": (b"a: 'x", "", 1),
    "tab": (b"a:\n\tb: 1", "indent with spaces", 2),
    "byte order mark": (b"\xef\xbb\xbfa: 1", "byte order mark", None),
    "utf-16": ("a: 1".encode("utf-16"), "byte order mark", None),
    "not utf-8": (b"a: 1\nb: \xff", "not UTF-8", 2),
    "nul": (b"a: 1\nb: \x00", "NUL", 2),
    "control": (b"a: \x07", "", None),
    "too large": (b"a: 1e999", "too large", 1),
    "nan": (b"a:\n  - .nan", "not a usable number", 2),
    "list": (b"- a\n- b", "mapping", None),
    "text": (b"hello", "mapping", None),
    "truncated": (b"a: {b: [1, 2", "", None),
    "two documents": (b"a: 1\n---\nb: 2", "", None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_shortly_and_soon(name, tmp_path):
    raw, part, line = HOSTILE[name]
    file = tmp_path / "hostile.yaml"
    file.write_bytes(raw)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    message = str(caught.value)
    assert time.process_time() - start < 2
    assert len(message.encode()) < 2000
    assert str(file) in message
    assert part in message
    assert line is None or f"line {line}" in message


def test_a_large_honest_file_is_read_soon(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text("".join(f"key_{n}: [1, 2.5, text, {{a: b}}]\n" for n in range(6_000)))
    start = time.process_time()
    assert len(load_file(file)) == 6_000
    assert time.process_time() - start < 60  # minutes, where every key is compared with all others


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("1_000", 1000),
        (".inf", math.inf),
        ("0x1f", 31),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    loaded = load_text(f"a: {text}", "config.yaml")["a"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_plain_configs_load_as_safe_load_does():
    text = "base: &base {b: [1, 2.5, true, null, text]}\ncopy: *base\nmerged: {<<: *base, c: 3}\nempty:\n"
    assert load_text(text, "config.yaml") == yaml.safe_load(text)


def test_words_of_the_command_line_stay_words():
    assert load_text("{a, b}") == "{a, b}"
    assert load_text("path:") == "path:"
    assert load_text("{a: 1}") == {"a": 1}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_file(tmp_path / "nowhere.yaml")
