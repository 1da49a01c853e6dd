"""What ranking costs: ranks of both directions, a Sinkhorn bias from a large bank, search in two stages.

    python benchmarks/retrieval_ranking.py [ranks sinkhorn search] [--threads 1] [--rounds 3]

- ranks: 10,000 x 10,000 scores counted, against the published way (numpy sorts all of it, once per direction) and
  against argsort. Bars: at least 7 and 40 times faster, at most 16 MiB.
- sinkhorn: the bias of 1,000 candidates from 180,000 queries streamed from features, against the published linear form
  on a whole matrix of fewer.
- search: 100,000 sets of features in bfloat16 (``--videos``, ``--width``), of clusters of near duplicates. A query
  scored against all at all levels, and in two stages. Bars: at least 8 times faster, under 0.1 point of recall lost.
  A text is lost at most where its video is not among the candidates: that share is counted on ``--texts``.

Memory is the highest sum of live tensors (of arrays, for numpy) during the call, beside what it was given.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from measure import load, machine, minima, peak_bytes
from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.retrieval.coarse_to_fine import coarse_to_fine_similarity
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.ranks import ranks_both_ways
from fulgurite.methods.retrieval.sinkhorn import streamed_sinkhorn_bias
from fulgurite.methods.retrieval.two_stage import coarse_candidates, two_stage_search
from fulgurite.metrics.retrieval_recall import rank_figures

MIB = 2**20
SCALE, WORDS, FRAMES, PATCHES = 100.0, 32, 12, 4
CLUSTER = 20  # videos that look alike


def sorted_ranks(scores: np.ndarray) -> np.ndarray:
    """The published way: places in a sorted row that have the score of the diagonal."""
    right = np.diag(-scores)[:, None]
    return 1 + np.where(np.sort(-scores, axis=1) - right == 0)[1]


def argsort_ranks(scores: Tensor) -> Tensor:
    order = scores.argsort(dim=1, descending=True)
    return 1 + (order == torch.arange(len(scores))[:, None]).nonzero()[:, 1]


def numpy_peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def rank_section(size: int, rounds: int) -> None:
    scores = torch.randn(size, size) + 3 * torch.eye(size)
    array = scores.numpy()
    calls = {
        "counted": lambda: [rank_figures(ranks) for ranks in ranks_both_ways(scores)],
        "numpy sort": lambda: [sorted_ranks(each) for each in (array, array.T)],
        "argsort": lambda: [argsort_ranks(each) for each in (scores, scores.T)],
    }
    found: dict[str, list] = {}
    memory = {
        name: (numpy_peak if name == "numpy sort" else peak_bytes)(lambda n=name, c=call: found.update({n: c()}))
        for name, call in calls.items()
    }
    figures = [rank_figures(torch.as_tensor(ranks)) for ranks in found["numpy sort"] + found["argsort"]]
    if figures != 2 * found["counted"]:
        raise SystemExit(f"figures differ: {figures}, counted {found['counted']}")
    times = minima(calls, rounds)
    print(f"\nranks of both directions, {size} x {size}")
    for name, taken in times.items():
        ratio = taken / times["counted"]
        print(f"  {name:<11}{taken * 1e3:9.0f} ms = {ratio:6.1f} x counted   {memory[name] / MIB:8.1f} MiB")


def linear_sinkhorn(bank: Tensor, iterations: int = 4) -> Tensor:
    """The published form on a whole matrix."""
    kernel = (bank - bank.max()).exp()
    columns = 1 / kernel.sum(0)
    for _ in range(iterations):
        columns = 1 / ((1 / (kernel @ columns)) @ kernel)
    return columns.log().log_softmax(0)


def sinkhorn_section(bank_size: int, candidates: int, rounds: int, width: int = 512, small: int = 20_000) -> None:
    texts = F.normalize(torch.randn(bank_size, width), dim=1)
    videos = F.normalize(torch.randn(candidates, width), dim=1)

    def streamed(count: int) -> Tensor:
        blocks = texts[:count].split(2048)
        return streamed_sinkhorn_bias(lambda: ((SCALE * each @ videos.T)[None] for each in blocks))[0]

    calls = {
        "streamed, large": lambda: streamed(bank_size),
        "streamed, small": lambda: streamed(small),
        "whole, small": lambda: linear_sinkhorn(SCALE * texts[:small] @ videos.T),
    }
    away = (calls["streamed, small"]() - calls["whole, small"]()).abs().max()
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    times = minima(calls, rounds)
    print(f"\nSinkhorn bias of {candidates} candidates, 4 iterations; forms differ by {away:.1e}")
    for name, taken in times.items():
        rows = bank_size if "large" in name else small
        print(f"  {name:<16}{rows:>8} queries {taken:7.2f} s, {taken / rows * 1e6:6.1f} us each   ", end="")
        print(f"{memory[name] / MIB:6.1f} MiB (the matrix alone: {4 * rows * candidates / MIB:.0f})")


def near(x: Tensor, noise: float) -> Tensor:
    """``x`` with a random part of ``noise`` times its length."""
    return F.normalize(F.normalize(x, dim=-1) + noise * torch.randn(x.shape) / x.shape[-1] ** 0.5, dim=-1)


def stored(videos: int, width: int) -> tuple[VideoFeatures, Tensor]:
    """Features of all videos in bfloat16, and the direction (V, D) of each."""
    centres = torch.randn(-(-videos // CLUSTER), width)
    directions = near(centres.repeat_interleave(CLUSTER, 0)[:videos], 0.25)
    made = VideoFeatures(
        torch.empty(videos, width, dtype=torch.bfloat16),
        torch.empty(videos, FRAMES, width, dtype=torch.bfloat16),
        torch.empty(videos, FRAMES * PATCHES, width, dtype=torch.bfloat16),
    )
    for start in range(0, videos, 2000):
        rows = slice(start, start + 2000)
        frames = near(directions[rows, None].expand(-1, FRAMES, -1), 0.6)
        made.frames[rows] = frames
        made.video[rows] = F.normalize(frames.mean(1), dim=-1)
        made.patches[rows] = 10 * near(frames.repeat_interleave(PATCHES, 1), 1.5)
    return made, directions


def described(directions: Tensor) -> TextFeatures:
    """One text per direction: a sentence near it, words further away."""
    return TextFeatures(near(directions, 2.5), near(directions[:, None].expand(-1, WORDS, -1), 3.0))


def search_section(options: argparse.Namespace) -> None:
    videos, directions = stored(options.videos, options.width)
    size = sum(value.numel() * value.element_size() for value in videos.tensors().values())
    chosen = torch.randperm(options.videos)[: options.texts]
    texts = described(directions[chosen])
    del directions
    frame, word, patch = torch.eye(FRAMES), torch.eye(WORDS), torch.eye(FRAMES * PATCHES)

    def levels(queries: TextFeatures, some: VideoFeatures) -> Tensor:
        return coarse_to_fine_similarity(
            queries, some, frame, word, word, patch, patch, SCALE, dtype=getattr(torch, options.products)
        )

    def full(count: int) -> Tensor:
        blocks = (videos[slice(start, start + 4096)] for start in range(0, options.videos, 4096))
        return torch.cat([levels(texts[:count], block).mean(0) for block in blocks], 1)

    def two_stage(count: int) -> tuple[Tensor, Tensor]:
        def fine(query: int, columns: Tensor) -> Tensor:
            return levels(texts[query : query + 1], videos[columns])[:, 0]

        return two_stage_search(SCALE * texts.sentence[:count], videos.video, fine, options.candidates)

    def lost() -> float:
        missed = 0
        for start in range(0, len(chosen), 256):
            rows = slice(start, start + 256)
            _, found = coarse_candidates(texts.sentence[rows], videos.video, options.candidates)
            missed += int((found != chosen[rows, None]).all(1).sum())
        return 100 * missed / len(chosen)

    count, right = options.queries, chosen[: options.queries]
    memory = peak_bytes(lambda: two_stage(count))
    start = time.process_time()
    scores, full_s = full(count), 0.0
    full_s = time.process_time() - start
    start = time.process_time()
    found = two_stage(count)[1]
    two_s = time.process_time() - start
    again_s = minima({"two": lambda: two_stage(count)}, options.rounds)["two"]
    places = 1 + (scores > scores.gather(1, right[:, None])).sum(1)
    _, coarse = coarse_candidates(texts.sentence[:count], videos.video, 10)
    print(f"\nsearch over {options.videos} videos, D={options.width}, {size / 1e9:.1f} GB, {options.products} products")
    print(f"  all levels against all   {full_s / count * 1e3:9.1f} ms per query")
    print(f"  two stages, best {options.candidates:<8}{two_s / count * 1e3:9.1f} ms per query = {full_s / two_s:.1f} x")
    print(f"    the least of {options.rounds} more: {again_s / count * 1e3:.1f} ms; {memory / MIB:.1f} MiB")
    for k in (1, 5, 10):
        hit = (found[:, :k] == right[:, None]).any(1).double().mean() * 100
        first = (coarse[:, :k] == right[:, None]).any(1).double().mean() * 100
        print(f"  R@{k:<3} of {count}: all {100 * (places <= k).double().mean():.2f}   two stages {hit:.2f}   ", end="")
        print(f"coarse alone {first:.2f}")
    print(f"  not among the candidates, so lost at most: {lost():.3f} points, on {len(chosen)} texts")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=["ranks", "sinkhorn", "search"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=180_000)
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--texts", type=int, default=5_000)
    parser.add_argument("--products", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine(options.threads), flush=True)
    if "ranks" in options.sections:
        rank_section(options.size, options.rounds)
    if "sinkhorn" in options.sections:
        sinkhorn_section(options.bank, 1000, options.rounds)
    if "search" in options.sections:
        search_section(options)
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
