"""Solvers, selections and transforms of compression against their plain forms, in one process, alternately.

    python benchmarks/compression.py [--parts solvers selections hadamard zeroth walk] [--rounds 3] [--threads 2]

Plain forms are those of the published programs, written anew: three factorisations in a row, a rank-one update of the
whole block for every column, a stable sort of all scores, a loop over the columns of N:M, a product with the dense
Hadamard matrix, two whole forward passes per matrix. Both get the same Gram matrix; losses of solvers are compared as
tr((W - Q) H (W - Q)^T). Figures are minima over the rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from measure import machine, minima, peak_bytes
from torch import Tensor, nn

from fulgurite.methods.compression import Compressor, compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.n_m import n_m_mask
from fulgurite.methods.pruning.sparsegpt import SparseGpt, sparsegpt
from fulgurite.methods.pruning.wanda import wanda_mask
from fulgurite.methods.quantization.gptq import Gptq, gptq
from fulgurite.methods.quantization.hadamard import hadamard_transform
from fulgurite.methods.structure import ModelSpec, Tower

MB = 1 << 20
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096))
BLOCK, GROUP, BITS = 128, 128, 4
WIDTH, TOKENS = 256, 256  # of the walk
Call = Callable[[], Tensor]
# At least so many times faster than the plain form, by shape (4096 x 1024, all others).
BARS = {"GPTQ": (2.0, 1.6), "2:4": (2.0, 1.6), "50 %": (4.0, 1.6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    for part in options.parts:
        print()
        PARTS[part](options.rounds)


@torch.no_grad()
def solvers(rounds: int) -> None:
    """Time, loss and memory of the column solvers."""
    header = "shape        method    plain ms   ours ms  faster   bar  loss ours/plain    MiB  plain"
    print(header)
    for rows, columns in SHAPES:
        weight, gram = layer(rows, columns)
        for name, (ours, plain) in solver_pairs(weight, gram).items():
            times = minima({"ours": ours, "plain": plain}, rounds)
            losses = [loss_of(weight, call(), gram) for call in (ours, plain)]
            memory = [peak_bytes(call) / MB for call in (ours, plain)]
            bar = BARS[name][(rows, columns) != (4096, 1024)]
            print(
                f"{f'{rows}x{columns}':12} {name:8} {1e3 * times['plain']:9.0f} {1e3 * times['ours']:9.0f} "
                f"{times['plain'] / times['ours']:6.2f}x {bar:4.1f}x {losses[0] / losses[1]:16.5f} {memory[0]:6.0f} "
                f"{memory[1]:6.0f}"
            )


def solver_pairs(weight: Tensor, gram: Tensor) -> dict[str, tuple[Call, Call]]:
    """Ours and the plain form of every method."""
    return {
        "GPTQ": (lambda: gptq(weight, gram, BITS, GROUP).weight, lambda: plain_gptq(weight, gram)),
        "50 %": (lambda: sparsegpt(weight, gram, 0.5).weight, lambda: plain_sparse(weight, gram, 0.5, None)),
        "2:4": (
            lambda: sparsegpt(weight, gram, pattern="2:4").weight,
            lambda: plain_sparse(weight, gram, None, (2, 4)),
        ),
    }


@torch.no_grad()
def selections(rounds: int) -> None:
    """Time of choosing weights, with equal masks."""
    weight, gram = layer(4096, 1024)
    norm = gram.diagonal().sqrt()
    scores = weight.abs() * norm
    pairs = {
        "Wanda rows": (lambda: wanda_mask(weight, norm, 0.5), lambda: plain_rows(weight, norm, 0.5), 6.0),
        "2:4 mask": (lambda: n_m_mask(scores, "2:4"), lambda: plain_runs(scores, 2, 4), 4.0),
    }
    print(f"{'selection':12} {'plain ms':>9} {'ours ms':>9} {'faster':>7} {'bar':>5}  masks")
    for name, (ours, plain, bar) in pairs.items():
        times = minima({"ours": ours, "plain": plain}, rounds)
        same = "equal" if torch.equal(ours(), plain()) else "DIFFER"
        print(
            f"{name:12} {1e3 * times['plain']:9.1f} {1e3 * times['ours']:9.1f} "
            f"{times['plain'] / times['ours']:6.1f}x {bar:4.1f}x  {same}"
        )


@torch.no_grad()
def hadamard(rounds: int) -> None:
    """The transform of 4096 rows of 4096 against the product with the dense matrix."""
    x = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    dense = sylvester(4096) / 64
    times = minima({"ours": lambda: hadamard_transform(x), "dense": lambda: x @ dense.T}, rounds)
    error = (hadamard_transform(x) - x @ dense.T).abs().max()
    beyond = (peak_bytes(lambda: hadamard_transform(x)) - x.numel() * x.element_size()) / MB
    print(
        f"Hadamard 4096 x 4096: dense {1e3 * times['dense']:.0f} ms, ours {1e3 * times['ours']:.0f} ms, "
        f"1/{times['dense'] / times['ours']:.1f} (bar 1/12); {beyond:.1f} MiB beyond the output (bar 4); "
        f"largest difference {error:.1e}"
    )


@torch.no_grad()
def zeroth(rounds: int) -> None:
    """Block evaluations of zeroth-order scores against two whole passes per matrix and batch."""
    model, spec, batches = chain(12, 64)
    walk = LayerWalk(model, spec, batches, model)
    Ecoflap(0.5, samples=None).importance(walk, lambda batch: model(batch).square().mean())
    published = 2 * len(matrices(walk)) * len(batches) * len(model.blocks)
    share = model.count[0] / published
    print(
        f"zeroth-order scores of {len(matrices(walk))} matrices in {len(model.blocks)} blocks: {model.count[0]} blocks "
        f"computed, {published} by whole passes: {share:.2f} (bar 0.5)"
    )


@torch.no_grad()
def walk(rounds: int) -> None:
    """Peak memory of a walk beside the model, against one block, its Grams and two buffers of activations."""
    for compressor in (SparseGpt(0.5), Gptq(4)):
        model, spec, batches = chain(3, WIDTH, TOKENS, number=8)
        steps = LayerWalk(model, spec, batches, model)
        compressor.begin(matrices(steps))
        peak = peak_bytes(lambda steps=steps, compressor=compressor: drain(steps, compressor)) / MB
        hidden = 4 * WIDTH
        block = 4 * (2 * WIDTH * hidden) / MB
        grams = 8 * (WIDTH**2 + hidden**2) / MB
        buffers = 2 * 4 * len(batches) * TOKENS * WIDTH / MB
        inside = 4 * TOKENS * hidden / MB
        needed = block + grams + buffers + inside
        print(
            f"{type(compressor).__name__}: peak {peak:.0f} MiB beside the model; one block {block:.0f}, its Grams "
            f"{grams:.0f}, two buffers {buffers:.0f}, hidden units of a batch {inside:.0f}: {needed:.0f}"
        )


def drain(steps: LayerWalk, compressor: Compressor) -> None:
    for _ in compressed_blocks(steps, compressor):
        pass


PARTS: dict[str, Callable[[int], None]] = {
    "solvers": solvers,
    "selections": selections,
    "hadamard": hadamard,
    "zeroth": zeroth,
    "walk": walk,
}


class Block(nn.Module):
    """x + down(relu(up(x))), counting how often it is computed."""

    def __init__(self, width: int, hidden: int, owner: list) -> None:
        super().__init__()
        self.up, self.down, self.owner = nn.Linear(width, hidden), nn.Linear(hidden, width), owner

    def forward(self, x: Tensor) -> Tensor:
        self.owner[0] += 1
        return x + self.down(self.up(x).relu())


class Chain(nn.Module):
    """Blocks in a row."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.count = [0]
        self.blocks = nn.ModuleList(Block(width, 4 * width, self.count) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def chain(num_blocks: int, width: int, tokens: int = 8, number: int = 2) -> tuple[Chain, ModelSpec, list[Tensor]]:
    """A model, its spec, and batches."""
    torch.manual_seed(0)
    model = Chain(num_blocks, width).eval()
    spec = ModelSpec((Tower("chain", r"blocks\.\d+", num_blocks, width),))
    return model, spec, [torch.randn(1, tokens, width) for _ in range(number)]


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram of inputs some of whose columns are large."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs *= torch.rand(columns, generator=generator).mul(3).exp()
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return weight, inputs.T @ inputs / len(inputs)


def loss_of(weight: Tensor, result: Tensor, gram: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    change = (result - weight).double()
    return ((change @ gram.double()) * change).sum().item()


def plain_factor(gram: Tensor) -> Tensor:
    """U with H^-1 = U^T U, by three factorisations."""
    damped = gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


Replace = Callable[[int, Tensor], None]


def plain_blocks(weight: Tensor, upper: Tensor) -> Iterator[tuple[Tensor, Tensor, Replace]]:
    """A block's weights, its part of U, and what to call with a column of it and the column's new values."""
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        inside, factor = weight[:, first:last].clone(), upper[first:last, first:last]
        errors, done = torch.zeros_like(inside), torch.zeros_like(inside)

        def replace(
            column: int, values: Tensor, own: tuple[Tensor, Tensor, Tensor, Tensor] = (inside, factor, errors, done)
        ) -> None:
            inside, factor, errors, done = own
            error = (inside[:, column] - values) / factor[column, column]
            done[:, column] = values
            inside[:, column:] -= error[:, None] @ factor[column, column:][None]
            errors[:, column] = error

        yield inside, factor, replace
        weight[:, first:last] = done
        weight[:, last:] -= errors @ upper[first:last, last:]


def plain_gptq(weight: Tensor, gram: Tensor) -> Tensor:
    """Grids are fitted where their group begins, on weights that hold all updates."""
    weight, upper = weight.clone(), plain_factor(gram)
    for inside, _, replace in plain_blocks(weight, upper):
        low, high = inside.amin(1).clamp(max=0), inside.amax(1).clamp(min=0)
        scale = (high - low) / (2**BITS - 1)
        zero = (-low / scale).round()
        for column in range(inside.shape[1]):
            levels = ((inside[:, column] / scale).round() + zero).clamp(0, 2**BITS - 1)
            replace(column, scale * (levels - zero))
    return weight


def plain_sparse(weight: Tensor, gram: Tensor, sparsity: float | None, pattern: tuple[int, int] | None) -> Tensor:
    """Masks by a sort of all scores of a block, or by runs of columns."""
    weight, upper = weight.clone(), plain_factor(gram)
    for inside, factor, replace in plain_blocks(weight, upper):
        pruned = torch.zeros_like(inside, dtype=torch.bool)
        if sparsity is not None:
            scores = inside.square() / factor.diagonal().square()
            threshold = scores.flatten().sort()[0][int(scores.numel() * sparsity) - 1]
            pruned = scores <= threshold
        for column in range(inside.shape[1]):
            if pattern is not None and column % pattern[1] == 0:
                run = slice(column, column + pattern[1])
                scores = inside[:, run].square() / factor.diagonal()[run].square()
                pruned[:, run].scatter_(1, scores.topk(pattern[1] - pattern[0], dim=1, largest=False)[1], True)
            replace(column, inside[:, column].masked_fill(pruned[:, column], 0))
    return weight


def plain_rows(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    """A stable sort of every row."""
    scores = weight.abs() * norm
    order = scores.sort(dim=1, stable=True)[1][:, : int(sparsity * weight.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)


def plain_runs(scores: Tensor, kept: int, run: int) -> Tensor:
    """A loop over runs of columns."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], run):
        order = scores[:, first : first + run].topk(run - kept, dim=1, largest=False)[1]
        mask.scatter_(1, first + order, False)
    return mask


def sylvester(size: int) -> Tensor:
    """The Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    for _ in range(int(math.log2(size))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


if __name__ == "__main__":
    main()
