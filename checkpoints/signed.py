"""Signed JSON: its last entry, ``digest``, covers all bytes before that entry, so any change is found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulgurite.checkpoints.digest import digest_of_bytes
from fulgurite.checkpoints.errors import DamagedError

_TAIL = re.compile(rb'\n  "digest": "([a-z0-9_]+:[0-9a-f]+)"\n\}\n\Z')


def body_of(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON object that its digest covers. NaN and infinities raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text.removesuffix("\n}").encode() + b","


def sign(body: bytes) -> bytes:
    """The whole file: ``body`` and its digest."""
    return body + f'\n  "digest": "{digest_of_bytes(body)}"\n}}\n'.encode()


def open_signed(file: Path, data: bytes, advice: str) -> dict[str, Any]:
    """The object in ``data``, without its digest.

    Args:
        file: where the bytes come from, for messages.
        data: the content of the file.
        advice: what to do, the end of a message.

    Raises:
        DamagedError: a byte differs from what was signed.
    """
    tail = _TAIL.search(data)
    body = data[: tail.start()] if tail else b""
    if not tail or sign(body) != data:
        found = digest_of_bytes(body) if tail else "no digest"
        expected = tail[1].decode() if tail else "a digest as last entry"
        raise DamagedError(f"{file} is damaged: expected {expected}, found {found}. {advice}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error}. {advice}") from error
    del value["digest"]
    return value
