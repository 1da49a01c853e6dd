"""Options of the commands that build no module."""

from typing import Literal

import jsonargparse
import pytest

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.options import parsed, with_flags


def parser_of():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("source", type=str)
    parser.add_argument("--dry_run", type=bool, default=False)
    parser.add_argument("--kind", type=Literal["a", "b"], default="a")
    return parser


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["x", "--dry-run"], ["x", "--dry_run=true"]),
        (["--dry_run", "--kind", "a"], ["--dry_run=true", "--kind", "a"]),
        (["--dry_run", "false"], ["--dry_run", "false"]),
        (["--dry-run=false"], ["--dry_run=false"]),
        (["--kind", "dry-run"], ["--kind", "dry-run"]),
        (["--dry-runner"], ["--dry-runner"]),
    ],
)
def test_a_flag_alone_means_true(given, expected):
    assert with_flags(given, ("--dry_run",)) == expected


def test_values_and_admitted_packages():
    options, allow = parsed(["x", "--allow", "mine", "--dry-run", "--allow=other"], parser_of, ("--dry_run",))
    assert (options.source, options.dry_run, allow) == ("x", True, ("mine", "other"))
    assert parsed(["x", "--dry_run", "false"], parser_of, ("--dry_run",))[0].dry_run is False


def test_wrong_usage_is_one_message():
    with pytest.raises(ConfigError, match="kind"):
        parsed(["x", "--kind", "c"], parser_of)
