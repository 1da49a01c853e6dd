"""Sizes as people read them."""

import pytest

from fulgurite.commands.tables import size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_550, "1.6 kB"),
        (999_949, "999.9 kB"),
        (3_200_000, "3.2 MB"),
        (5 * 10**12, "5000.0 GB"),
    ],
)
def test_size_text(num_bytes, text):
    assert size_text(num_bytes) == text
