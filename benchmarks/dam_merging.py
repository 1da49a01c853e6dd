"""Per-sample mixing of bottleneck adapters against one plain adapter and against the naive per-sample form.

    python benchmarks/dam_merging.py [--rounds 15] [--threads 2]

Every round runs all forms one after the other in this process; a form's time is its minimum over the rounds,
and figures are multiples of the plain adapter's. The naive form is the published one: all K experts are
weighted for every sample, (B, K, O, I), summed, and applied by einsum. Memory is the peak of what one call
allocates.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from measure import load, machine, minima, peak_bytes
from torch import Tensor
from torch.nn import functional as F

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.mixing import Mixture
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.routing.centroid import mixing_weights

SAMPLES, POSITIONS, REDUCTION = 32, 74, 8


def naive(experts: list[Bottleneck], weights: Tensor, y: Tensor) -> Tensor:
    """The published form of per-sample merging."""

    def linear(x: Tensor, name: str) -> Tensor:
        layers = [getattr(expert, name) for expert in experts]
        matrices, biases = torch.stack([m.weight for m in layers]), torch.stack([m.bias for m in layers])
        merged = (weights[:, :, None, None] * matrices).sum(1)  # (B, K, O, I) on the way
        return torch.einsum("bsi,boi->bso", x, merged) + (weights[:, :, None] * biases).sum(1)[:, None]

    return y + linear(F.relu(linear(y, "down")), "up")


def draw(width: int, num_experts: int, generator: torch.Generator) -> tuple[list[Bottleneck], Tensor, Tensor]:
    """Experts, top-2 weights with a distinct row per sample, and what leaves a site."""
    experts = [Bottleneck(width, REDUCTION, init="official").requires_grad_(False) for _ in range(num_experts)]
    for expert in experts:
        expert.reset_parameters(generator)
    similarities = 0.8 + 0.02 * torch.rand(SAMPLES, num_experts, generator=generator)
    y = torch.randn(SAMPLES, POSITIONS, width, generator=generator)
    return experts, mixing_weights(similarities, top_k=2, temperature=0.01), y


@torch.no_grad()
def measure(width: int, rounds: int) -> None:
    """Print one width's figures."""
    generator = torch.Generator().manual_seed(0)
    cases = {num_experts: draw(width, num_experts, generator) for num_experts in (6, 50)}
    calls: dict[str, Callable[[], object]] = {}
    for num_experts, (experts, weights, y) in cases.items():
        mixture = Mixture.of(weights)
        difference = Bottleneck.mix(experts, mixture, y, y) - naive(experts, weights, y)
        if difference.abs().max() > 1e-4:
            raise ArithmeticError(f"forms differ by {difference.abs().max():.2e} at D={width}, K={num_experts}")
        calls[f"plain {num_experts}"] = lambda e=experts, y=y: e[0](y, y)
        calls[f"mixed {num_experts}"] = lambda e=experts, m=mixture, y=y: Bottleneck.mix(e, m, y, y)
        calls[f"grouping {num_experts}"] = lambda w=weights: Mixture.of(w)
    times = minima(calls, rounds)
    naive_calls = {f"naive {k}": lambda c=c: naive(c[0], c[1], c[2]) for k, c in cases.items()}
    times |= minima(naive_calls, max(2, rounds // 8))
    plain = min(times["plain 6"], times["plain 50"])
    print(f"\nD={width}: plain adapter {plain * 1e3:.2f} ms, {peak_bytes(calls['plain 6']) / 2**20:.1f} MiB")
    for num_experts in cases:
        mixed, slow = times[f"mixed {num_experts}"], times[f"naive {num_experts}"]
        memory = peak_bytes(calls[f"mixed {num_experts}"]), peak_bytes(naive_calls[f"naive {num_experts}"])
        print(
            f"  K={num_experts:<3} mixed {mixed / plain:5.2f} x plain, {memory[0] / 2**20:.1f} MiB   "
            f"naive {slow / plain:6.1f} x plain, {memory[1] / 2**20:.0f} MiB = {slow / mixed:.1f} x mixed   "
            f"(finding equal rows, once per batch: {times[f'grouping {num_experts}'] * 1e3:.2f} ms)"
        )
    print(f"  K=50 against K=6: {times['mixed 50'] / times['mixed 6']:.2f}")


@torch.no_grad()
def measure_whole_model(rounds: int) -> None:
    """Print the quickstart model's forward with top-2 mixing against the forward with one adapter set."""
    generator = torch.Generator().manual_seed(0)
    encoder = TimmFrameEncoder("test_efficientnet", weights=None)
    encoder.width = 1280  # frames come as stored features of the quickstart's encoder
    backbone = PrefixEncoder(frame_encoder=encoder)
    backbone.set_answers([f"answer {i}" for i in range(63)])
    kinds = functools.partial(Bottleneck, reduction=REDUCTION, activation="gelu", init="official")
    placements = [
        Placement(["attention_output", "feed_forward_output"], kinds),
        Placement(["video_projection"], Replace),
    ]
    names = [f"world {i}" for i in range(5)]
    bank = AdapterBank(backbone, placements, names)
    batch = {
        "input_ids": torch.randint(1000, 20000, (SAMPLES, 12), generator=generator),
        "attention_mask": torch.ones(SAMPLES, 12, dtype=torch.long),
        "video": torch.randn(SAMPLES, 24, 1280, generator=generator),
    }
    similarities = 0.8 + 0.02 * torch.rand(SAMPLES, 5, generator=generator)
    weights = mixing_weights(similarities, top_k=2, temperature=0.01)

    def forward(selection: str | Tensor | None) -> None:
        with bank.use(selection, names if isinstance(selection, Tensor) else None):
            backbone(batch)

    calls = {"bare": lambda: forward(None), "one": lambda: forward(names[0]), "mixed": lambda: forward(weights)}
    times = minima(calls, rounds)
    print(
        f"\nquickstart model, B={SAMPLES}: forward with one adapter set {times['one'] * 1e3:.0f} ms, "
        f"with mixing {times['mixed'] / times['one']:.3f} x, without adapters {times['bare'] / times['one']:.3f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 768])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.threads)}; B={SAMPLES}, S={POSITIONS}, reduction {REDUCTION}, top-2")
    for width in options.widths:
        measure(width, options.rounds)
    measure_whole_model(options.rounds)
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
