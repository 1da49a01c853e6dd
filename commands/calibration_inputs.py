"""What ``prune`` and ``quantize`` measure another library's model on: batches of text or of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fulgurite.backbones.library_models import LibraryModel
from fulgurite.checkpoints import digest_of_json, digest_of_tensor
from fulgurite.commands.errors import ConfigError
from fulgurite.datamodules.picture_files import drawn_pictures
from fulgurite.datamodules.text_windows import consecutive_windows, random_windows, token_ids
from fulgurite.methods.quantization.rsq import rolled_copies

TOKENS_AT_ONCE = 2048  # of windows that run together
AT_ONCE = 16  # pictures


def calibration(opened: LibraryModel, options: Any) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Batches, and what they are; none without data."""
    if options.pictures is not None:
        pictures = drawn_pictures(Path(options.pictures), options.samples, options.seed)
        images = [to_pil_image(picture.pixels()) for picture in pictures]
        batches = [opened.picture_inputs(images[at : at + AT_ONCE]) for at in range(0, len(images), AT_ONCE)]
        digest = digest_of_json([digest_of_tensor(tensor) for batch in batches for tensor in batch.values()])
        return batches, {"samples": options.samples, "seed": options.seed, "data": digest}
    copies = options.get("rolled_copies", 1)
    if copies != 1 and options.text is None:
        raise ConfigError(f"--rolled_copies {copies}: windows of text are rolled, and there is no --text; leave it out")
    if options.text is None:
        return [], {}
    require_length(opened, options.length)
    ids = token_ids(files_of(options.text), opened.tokenize)
    windows = rolled(random_windows(ids, options.samples, options.length, options.seed), copies)
    facts = {"samples": options.samples, "length": options.length, "seed": options.seed, "tokens_of_text": len(ids)}
    facts |= {} if copies == 1 else {"rolled_copies": copies}
    return inputs_of(opened, windows), {**facts, "data": digest_of_tensor(windows)}


def rolled(windows: Tensor, copies: int) -> Tensor:
    """Windows and their rolled copies; see `rolled_copies`."""
    try:
        return rolled_copies(windows, copies)
    except ValueError as error:
        raise ConfigError(f"--rolled_copies: {error}") from error


def evaluated(opened: LibraryModel, options: Any) -> Tensor | None:
    """Windows to score, or None."""
    if options.evaluate is None:
        return None
    require_length(opened, options.length)
    ids = token_ids(files_of(options.evaluate), opened.tokenize)
    return consecutive_windows(ids, options.length, options.evaluate_samples)


def require_length(opened: LibraryModel, length: int) -> None:
    """Refuse windows that the model cannot read."""
    if length < 2:
        raise ConfigError(f"--length {length}: a window has at least 2 tokens")
    if opened.longest is not None and length > opened.longest:
        raise ConfigError(f"--length {length}: the model reads at most {opened.longest} tokens; set --length lower")


def inputs_of(opened: LibraryModel, windows: Tensor) -> list[dict[str, Tensor]]:
    """Batches of windows that run together."""
    return [opened.text_inputs(part) for part in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))]


def files_of(given: str | list[str]) -> list[Path]:
    """Paths of one or more files."""
    return [Path(each) for each in ([given] if isinstance(given, str) else given)]
