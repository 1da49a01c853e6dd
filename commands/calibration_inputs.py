"""What ``prune`` and ``quantize`` measure another library's model on: batches of text, pictures or pairs of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fulgurite.backbones.library_models import LibraryModel
from fulgurite.checkpoints import digest_of_json, digest_of_tensor
from fulgurite.commands.errors import ConfigError
from fulgurite.datamodules.picture_files import drawn_pictures
from fulgurite.datamodules.picture_pairs import drawn_pairs
from fulgurite.datamodules.text_windows import consecutive_windows, random_windows, token_ids
from fulgurite.methods.quantization.rsq import rolled_copies
from fulgurite.samples.picture import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

TOKENS_AT_ONCE = 2048  # of windows that run together
AT_ONCE = 16  # pictures or pairs
Batches = list[dict[str, Tensor]]


def calibration(opened: LibraryModel, options: Any) -> tuple[Batches, dict[str, Any]]:
    """Batches, and what they are; none without data."""
    copies = options.get("rolled_copies", 1)
    count, seed, size = options.samples, options.seed, options.batch_size or AT_ONCE
    if options.pictures is not None:
        pictures = drawn_pictures(Path(options.pictures), count, seed)
        batches = [opened.picture_inputs(images(pictures[at : at + size])) for at in range(0, count, size)]
        return batches, {"of": "pictures", "samples": count, "seed": seed, **facts_of(batches, size)}
    if options.pairs is not None:
        pairs = drawn_pairs(Path(options.pairs), count, seed)
        parts = [pairs[at : at + size] for at in range(0, count, size)]
        batches = [
            opened.pair_inputs(images([pair.picture for pair in part]), {pair.where: pair.caption for pair in part})
            for part in parts
        ]
        return batches, {"of": "pairs", "samples": count, "seed": seed, **facts_of(batches, size)}
    if options.text is None:
        return [], {}
    require_length(opened, options.length)
    ids = token_ids(files_of(options.text), opened.tokenize)
    windows = rolled(random_windows(ids, count, options.length, seed), copies)
    batches = inputs_of(opened, windows, options.batch_size)
    facts = {"samples": count, "length": options.length, "seed": seed, "tokens_of_text": len(ids)}
    facts |= {} if copies == 1 else {"rolled_copies": copies}
    size = len(next(iter(batches[0].values())))
    return batches, {**facts, "batch_size": size, "data": digest_of_tensor(windows)}


def rolled(windows: Tensor, copies: int) -> Tensor:
    """Windows and their rolled copies; see `rolled_copies`."""
    try:
        return rolled_copies(windows, copies)
    except ValueError as error:
        raise ConfigError(f"--rolled_copies: {error}") from error


def images(pictures: Sequence[Picture]) -> list[Image]:
    """Their pixels, in RGB."""
    return [to_pil_image(picture.pixels()) for picture in pictures]


def facts_of(batches: Batches, size: int) -> dict[str, Any]:
    """What was drawn, and how it runs together."""
    digests = [digest_of_tensor(tensor) for batch in batches for tensor in batch.values()]
    return {"batch_size": size, "data": digest_of_json(digests)}


def require_partners(options: Any) -> None:
    """Refuse a batch of pairs whose loss says nothing."""
    size = options.batch_size or AT_ONCE
    if (options.samples % size or size) == 1:
        raise ConfigError(
            f"--samples {options.samples} in batches of {size}: one pair would be alone, and the loss tells a pair "
            "from the others of its batch; change --samples or --batch_size"
        )


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


def inputs_of(opened: LibraryModel, windows: Tensor, size: int | None = None) -> Batches:
    """Batches of ``size`` windows that run together; as many as have 2,048 tokens where None."""
    return [opened.text_inputs(part) for part in windows.split(size or max(1, TOKENS_AT_ONCE // windows.shape[1]))]


def files_of(given: str | list[str]) -> list[Path]:
    """Paths of one or more files."""
    return [Path(each) for each in ([given] if isinstance(given, str) else given)]
