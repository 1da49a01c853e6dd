"""Similarity of UCoFiA's three levels, and training of the finest, against the plain form of the equations.

    python benchmarks/retrieval.py [--rounds 5] [--threads 1] [--full] [--skip-training]

The plain form evaluates tiles of 32 texts and 32 videos, the published evaluation's batch, with one tensor operation
per step of the equations. Every round runs all forms one after the other in this process; a form's time is its minimum
over the rounds, and figures are multiples of the plain form's. Memory is the peak of what one call allocates, less the
scores. Texts and videos are synthetic; a video is likelier to be scored high by its own text. With ``--flush`` the
processor takes subnormal numbers for zero in all forms: the plain form is many times slower without it, as it is
published, while ours avoids them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from measure import load, machine, minima, peak_bytes
from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.retrieval.coarse_to_fine import coarse_to_fine_similarity
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures

FRAMES, WORDS, PATCHES, WIDTH = 12, 32, 48, 512
SCALE, TEMPERATURE, TILE, BATCH = 100.0, 0.01, 32, 128


def draw(pairs: int) -> tuple[TextFeatures, VideoFeatures, list[Tensor]]:
    """Features of texts and of their videos, patches of norm 10, and the matrices of a head somewhat trained."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    topic = noise(pairs, WIDTH)
    sentence, words = unit(topic + 3 * noise(pairs, WIDTH)), unit(topic[:, None] + 4 * noise(pairs, WORDS, WIDTH))
    video, frames = unit(topic + 3 * noise(pairs, WIDTH)), unit(topic[:, None] + 5 * noise(pairs, FRAMES, WIDTH))
    patches = 10 * unit(topic[:, None] + 4 * noise(pairs, PATCHES, WIDTH))
    sizes = (FRAMES, WORDS, WORDS, PATCHES, PATCHES)
    matrices = [torch.eye(size) + 0.02 * noise(size, size) for size in sizes]
    return TextFeatures(sentence, words), VideoFeatures(video, frames, patches), matrices


def aggregate(x: Tensor, matrix: Tensor) -> Tensor:
    """ISA over the last axis, as its equation reads."""
    weights = torch.softmax(torch.softmax(x / TEMPERATURE, dim=-1) @ matrix / TEMPERATURE, dim=-1)
    return torch.sum(weights * x, dim=-1)


def plain_fine(words: Tensor, patches: Tensor, matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Bi-ISA of all words with all patches."""
    products = (words.flatten(0, 1).to(dtype) @ patches.flatten(0, 1).to(dtype).T).float()
    products = products.view(len(words), WORDS, len(patches), PATCHES)
    words_first = aggregate(aggregate(products.permute(0, 2, 3, 1), matrices[1]), matrices[4])
    patches_first = aggregate(aggregate(products, matrices[3]).transpose(1, 2), matrices[2])
    return (words_first + patches_first) / 2


def plain(texts: TextFeatures, videos: VideoFeatures, matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(3, T, V) in the published evaluation's tiles."""
    rows = []
    for t in range(0, len(texts), TILE):
        row = []
        for v in range(0, len(videos), TILE):
            some, others = texts[t : t + TILE], videos[v : v + TILE]
            cosines = (some.sentence @ others.frames.flatten(0, 1).T).view(len(some), len(others), FRAMES)
            scores = (
                SCALE * some.sentence @ others.video.T,
                SCALE * aggregate(cosines, matrices[0]),
                plain_fine(some.words, others.patches, matrices, dtype),
            )
            row.append(torch.stack(scores))
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=1)


def ranks(scores: Tensor) -> Tensor:
    """Rank of the own video of every text, and of the own text of every video."""
    own = scores.diagonal()
    return torch.cat([(scores > own[:, None]).sum(1), (scores > own).sum(0)])


def moved(scores: Tensor, reference: Tensor) -> str:
    """How many ranks differ, and whether recalls do."""
    found, expected = ranks(scores), ranks(reference)
    differing = (found != expected).sum().item()
    recalls = "equal" if all(((found < k) == (expected < k)).all() for k in (1, 5, 10)) else "other"
    return f"{differing} of {len(found)} differ, {recalls} recalls"


def with_memory(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call gives, and the MiB that it needed beyond that."""
    kept: list[Tensor] = []
    peak = peak_bytes(lambda: kept.append(call()))
    return kept[0], (peak - kept[0].nbytes) / 2**20


@torch.no_grad()
def measure_similarity(pairs: int, rounds: int) -> None:
    """Print times, memory and agreement of both forms in both precisions."""
    texts, videos, matrices = draw(pairs)
    ours = functools.partial(coarse_to_fine_similarity, texts, videos, *matrices, SCALE, TEMPERATURE)
    calls = {
        "plain float32": lambda: plain(texts, videos, matrices, torch.float32),
        "ours float32": lambda: ours(dtype=torch.float32),
        "plain bfloat16": lambda: plain(texts, videos, matrices, torch.bfloat16),
        "ours bfloat16": lambda: ours(dtype=torch.bfloat16),
    }
    words, patches = texts.words.flatten(0, 1), videos.patches.flatten(0, 1)
    floor = torch.empty(8 * WORDS, len(patches))  # the products alone, in strips of 8 texts

    def products() -> None:
        for strip in words.split(len(floor)):
            torch.mm(strip, patches.T, out=floor[: len(strip)])

    times = minima(calls | {"products alone": products}, rounds)
    reference = calls["plain float32"]()
    print(f"\n{pairs} x {pairs}: plain form {times['plain float32']:.2f} s, {load()}")
    for name, call in calls.items():
        scores, beyond = with_memory(call)
        print(
            f"  {name:<15} {times[name] / times['plain float32']:.2f} x plain, {beyond:5.0f} MiB beyond the scores, "
            f"largest difference {(scores - reference).abs().max():.1e}\n"
            f"                  ranks by all levels: {moved(scores.mean(0), reference.mean(0))}; "
            f"by the finest: {moved(scores[2], reference[2])}"
        )
    print(f"  products alone  {times['products alone'] / times['plain float32']:.2f} x plain, in float32")


def measure_training(rounds: int) -> None:
    """Print time and memory of the finest level, forward and backward, in bfloat16."""
    texts, videos, matrices = draw(BATCH)
    leaves = [x.requires_grad_() for x in (texts.words, videos.patches, *matrices)]

    def ours() -> Tensor:
        return coarse_to_fine_similarity(
            texts, videos, *matrices, SCALE, TEMPERATURE, levels=("patch_word",), dtype=torch.bfloat16
        )[0]

    def whole() -> Tensor:
        return plain_fine(texts.words, videos.patches, matrices, torch.bfloat16)

    def step(score: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(score(), torch.arange(BATCH))
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    calls = {"plain": lambda: step(whole), "ours": lambda: step(ours)}
    times = minima(calls, rounds)
    print(f"\ntraining of the finest level, batch {BATCH}, bfloat16 products: plain form {times['plain']:.2f} s")
    for name, call in calls.items():
        print(f"  {name:<6} {times[name] / times['plain']:.2f} x plain, {peak_bytes(call) / 2**20:.0f} MiB")
    print(f"  gradient of the words differs by {relative_difference(calls['ours']()[0], calls['plain']()[0]):.1%}")


def relative_difference(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="1000 x 1000 instead of 256 x 256")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--flush", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(options.flush)
    subnormals = "flushed" if options.flush else "kept"
    print(f"{machine(options.threads)}; F={FRAMES}, W={WORDS}, {PATCHES} patches, D={WIDTH}; subnormals {subnormals}")
    print(f"bfloat16 on this processor: {', '.join(fast_bfloat16()) or 'slow'}")
    measure_similarity(1000 if options.full else 256, options.rounds)
    if not options.skip_training:
        measure_training(max(2, options.rounds // 2))
    print(f"at the end: {load()}")


def fast_bfloat16() -> list[str]:
    """The instructions for it."""
    found = torch.cpu.get_capabilities()
    return [name for name in ("avx512_bf16", "amx_bf16", "bf16") if found.get(name)]


if __name__ == "__main__":
    main()
