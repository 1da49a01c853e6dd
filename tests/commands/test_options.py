"""A new, changed or removed option is a decision, not an accident."""

import difflib

import pytest


def test_the_options_are_those_that_have_been_reviewed(project):
    from option_surface import FILE, surface

    kept, now = FILE.read_text(encoding="utf-8"), surface()
    difference = difflib.unified_diff(kept.splitlines(), now.splitlines(), "reviewed", "now", lineterm="", n=1)
    if kept != now:
        pytest.fail(
            "the options differ from tests/commands/options.txt; if that is meant, run "
            "`python tests/commands/option_surface.py` and commit the file:\n" + "\n".join(difference)
        )
