"""Captions as words, for scores that count words.

``"ptb"`` is the tokeniser of Stanford CoreNLP 3.4.1 that the COCO evaluation runs, which needs Java and the package
``pycocoevalcap``. ``"plain"`` follows its rules for plain English without either: lower case; words, numbers and
abbreviations in one piece; ``n't``, ``'s``, ``'re``, ``'ve``, ``'ll``, ``'d`` and ``'m`` on their own. Both leave out
the marks that the COCO evaluation leaves out. They differ where CoreNLP knows more, as of the period of "etc." and of
words like "cannot".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Tokenizer = Literal["plain", "ptb"]

INSTALL = "pip install 'fulgurite[captions]', which brings pycocoevalcap"
LEFT_OUT = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
_WORD = re.compile(
    r"(?:[a-z]\.){2,}"  # u.s.
    r"|\d+(?:[.,:]\d+)*(?![^\W_])"  # 1,000 and 3.5 and 10:30
    r"|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|[^\W_]+?(?=n't\b)"  # do, of don't
    r"|[^\W_]+(?:[-/][^\W_]+)*"  # words, black-and-white in one piece
    r"|\S"
)


def caption_words(captions: Sequence[str], tokenizer: Tokenizer = "plain") -> list[str]:
    """Each caption as words with single spaces between them, in the same order.

    Raises:
        RuntimeError: ``"ptb"`` without Java or without ``pycocoevalcap``.
    """
    captions = [" ".join(caption.split()) for caption in captions]
    if tokenizer == "plain":
        words = [_WORD.findall(caption.lower().translate(QUOTES)) for caption in captions]
        return [" ".join(word for word in each if word not in LEFT_OUT) for each in words]
    require_java("The tokenizer 'ptb'", "set tokenizer: plain")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line without text would be lost and shift the others.
    numbered = {number: [{"caption": caption or "."}] for number, caption in enumerate(captions)}
    if not numbered:
        return []
    said = PTBTokenizer().tokenize(numbered)
    return [said[number][0] for number in range(len(captions))]


def require_java(what: str, instead: str) -> None:
    """Raise `RuntimeError` where ``what`` cannot run: no ``pycocoevalcap``, or no Java. ``instead`` says what to do."""
    import shutil

    require_package(what)
    if shutil.which("java") is None:
        raise RuntimeError(f"{what} needs Java, and there is no program 'java': install a Java runtime, or {instead}")


def require_package(what: str) -> None:
    """Raise `RuntimeError` where ``pycocoevalcap`` is not installed."""
    import importlib.util

    if importlib.util.find_spec("pycocoevalcap") is None:
        raise RuntimeError(f"{what} needs the package pycocoevalcap: {INSTALL}")
