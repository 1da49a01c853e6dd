"""White-box attacks from one lens against all positions and layers, and many edits at once against one after the other.

    python benchmarks/unlearning.py [--rounds 7] [--threads 1] [--items 32] [--steps 10]

Attacks: 33 hidden states of 600 positions, width 1,024, vocabulary 32,000 (a 7B model's shape but for its width). The
published steps project every position of every layer and sort each row in full; they are timed on a few layers and
scaled to all, since all of them take 12 GiB. Ours reads the last position of the layers that Head Projection,
Probability Delta and its second difference name, once for the three. The floor is one product of the output matrix with
a vector. Peaks count what is allocated beyond the states and the matrix.

Edits: 8 blocks of SmolLM2-135M's shape with random weights, prompts of 8 and of 24 tokens with answers of two; rank-2
edits of one weight by Fact Erasure. Both ways make the same weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measure import load, machine, peak_bytes
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.schedules import Constant
from fulgurite.methods.structure import ModelSpec
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.probability_delta import ProbabilityDelta, SecondDifference
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.methods.unlearning.lens import LogitLens
from fulgurite.methods.unlearning.objectives.base import View
from fulgurite.methods.unlearning.objectives.fact_erasure import FactErasure
from fulgurite.modules.edited_state import EditedState
from fulgurite.modules.item_editing import Asked, Recipe, trained

MIB = 1 << 20
STATES, POSITIONS, WIDTH, VOCABULARY = 33, 600, 1024, 32_000
WORDS = 49_152  # of SmolLM2
TIMED = 2  # layers of the published steps that are timed


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of every call, all of them in turns, in seconds."""
    taken = {name: float("inf") for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name] = min(taken[name], time.perf_counter() - start)
    return taken


@torch.no_grad()
def attacks(rounds: int) -> None:
    """Print times and peaks of the three attacks."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(STATES, POSITIONS, WIDTH, generator=generator)
    norm, head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    forms = [HeadProjection(), ProbabilityDelta(), SecondDifference()]
    layers = sorted({layer for attack in forms for layer in attack.layers})
    lens = LogitLens(norm, head, STATES - 1)

    def read(rows: dict[int, Tensor]) -> list[Tensor]:
        probabilities = lens.probabilities(rows)
        return [attack.candidates(probabilities) for attack in forms]

    last = {layer: states[layer, -1:] for layer in layers}
    many = {layer: states[layer, -32:] for layer in layers}

    def published() -> None:
        for layer in layers[-TIMED:]:
            head(norm(states[layer])).softmax(-1).sort(dim=-1, descending=True)

    vector = states[0, 0]
    calls = {"floor": lambda: head.weight @ vector, "ours": lambda: read(last), "ours, 32 items": lambda: read(many)}
    taken = least(calls, rounds)
    start = time.perf_counter()
    published()
    whole = (time.perf_counter() - start) * STATES / TIMED
    peak = peak_bytes(lambda: read(last))
    # Logits, probabilities, sorted values, and their ids of 8 bytes.
    whole_peak = STATES * POSITIONS * VOCABULARY * (4 + 4 + 4 + 8)
    sorted_peak = peak_bytes(published)
    print(f"floor, one product with the output matrix: {1e3 * taken['floor']:.1f} ms")
    print(
        f"three attacks on {len(layers)} layers: {1e3 * taken['ours']:.1f} ms, "
        f"{taken['ours'] / taken['floor']:.2f} reads (bar 4); peak {peak / MIB:.2f} MiB, "
        f"{peak / (len(layers) * VOCABULARY):.1f} |S| V bytes (bar 8)"
    )
    print(
        f"all positions and layers, sorted: {whole:.1f} s ({TIMED} of {STATES} layers timed), "
        f"{whole / taken['ours']:,.0f} times the time (bar 1,000); {sorted_peak / MIB:,.0f} MiB for a layer at a time, "
        f"{whole_peak / MIB:,.0f} MiB for all at once, {whole_peak / peak:,.0f} times the memory (bar 1,000)"
    )
    each = taken["ours, 32 items"] / 32
    print(f"32 items at once: {1e3 * each:.1f} ms an item, {taken['ours'] / each:.1f} times fewer")


class Stack:
    """A small language model with one edited weight, and what `trained` asks of it."""

    def __init__(self, tokens: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=WORDS,
        )
        self.model = LlamaForCausalLM(config).requires_grad_(False).eval()
        self.tokens = tokens
        name = "model.layers.2.mlp.down_proj"
        self.site = self.model.get_submodule(name)
        spec = ModelSpec(towers=(), points={"edited": (name.replace(".", r"\."), 1)})
        self.bank = AdapterBank(self.model, [Placement(["edited"], LowRankEdit)], sets=(), spec=spec)
        self.state = EditedState(self.bank, self.site)

    def asked(self, numbers: list[int]) -> Asked:
        """A prompt and an answer of two tokens per item."""
        prompts = [
            torch.randint(WORDS, (self.tokens,), generator=torch.Generator().manual_seed(number)) for number in numbers
        ]
        labels = torch.stack([prompt.flip(0)[:2] for prompt in prompts])
        return Asked({"text": torch.stack(prompts)}, torch.arange(len(numbers)), [labels])

    def view(self, batch: dict, labels: Tensor, *unused: object) -> View:
        """A pass."""
        ids = torch.cat([batch["text"], labels[:, :-1]], dim=1)
        states = self.model.model(ids, use_cache=False).last_hidden_state[:, -labels.shape[1] :]
        # A part of a batch as it is would be multiplied row by row, each reading the output matrix.
        return View(self.model.lm_head(states.contiguous()), labels)

    def edited(self, numbers: list[int], steps: int) -> list[Tensor]:
        """The changes of the weight for some items, edited together."""
        edit = LowRankEdit(self.site, len(numbers), dropout=0.0)
        edit.start(numbers)

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=9e-3, weight_decay=0.0)

        recipe = Recipe(FactErasure(), None, 1.0, 0.0, steps, Constant(), optimizer)
        trained(self, self.state, edit, recipe, self.asked(numbers), None, [str(number) for number in numbers])
        return [edit.change(slot) for slot in range(len(numbers))]


def edits(tokens: int, items: int, steps: int, rounds: int) -> None:
    """Print times of edits together and one by one."""
    stack, numbers = Stack(tokens), list(range(items))
    made: dict[str, list[Tensor]] = {}

    def together() -> None:
        made["together"] = stack.edited(numbers, steps)

    def apart() -> None:
        made["apart"] = [change for number in numbers for change in stack.edited([number], steps)]

    taken = least({"together": together, "apart": apart}, rounds)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(made["together"], made["apart"]))
    print(
        f"{items} edits of {steps} steps, prompts of {tokens} tokens: {taken['together']:.2f} s together, "
        f"{taken['apart']:.2f} s one by one, {taken['apart'] / taken['together']:.1f} times faster (bar 5); "
        f"largest relative difference {error:.1e}"
    )


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    attacks(options.rounds)
    for tokens in (8, 24):
        edits(tokens, options.items, options.steps, max(1, options.rounds // 3))
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
