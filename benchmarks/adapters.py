"""A training step with adapters beside a frozen BERT-base, against the frozen forward and peft's LoRA.

    python benchmarks/adapters.py [--rounds 5] [--threads 2]

B=8, S=128, random weights, AdamW. All forms run interleaved in this process; times are minima over the rounds,
and memory is the peak of what one step allocates, without the optimizer's state.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from measure import load, machine, minima, peak_bytes
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.structure import ModelSpec

LAYER = r"encoder\.layer\.\d+\."
SPEC = ModelSpec(
    towers=(),
    points={
        "attention_output": (LAYER + r"attention\.output\.dense", 12),
        "feed_forward_output": (LAYER + r"output\.dense", 12),
        "query_value": (LAYER + r"attention\.self\.(query|value)", 24),
    },
)


def step(model: nn.Module, parameters: list[nn.Parameter], tokens: Tensor) -> Callable[[], None]:
    """One training step as a call."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def call() -> None:
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def banked(model: nn.Module, points: list[str], kind: Callable[[nn.Module], nn.Module]) -> list[nn.Parameter]:
    """Parameters of the live set of a new bank on ``model``."""
    return AdapterBank(model, [Placement(points, kind)], sets=(), spec=SPEC).parameters_of("live")


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{machine(options.threads)}; BERT-base size, B=8, S=128")
    frozen = BertModel(BertConfig(), add_pooling_layer=False).requires_grad_(False).eval()
    tokens = torch.randint(1000, 30000, (8, 128))
    bottleneck, lora = copy.deepcopy(frozen), copy.deepcopy(frozen)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    theirs = get_peft_model(copy.deepcopy(frozen), config)
    trained = {
        "peft LoRA q,v": (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        "bottleneck /8": (
            bottleneck,
            banked(bottleneck, ["attention_output", "feed_forward_output"], partial(Bottleneck, reduction=8)),
        ),
        "LoRA q,v": (lora, banked(lora, ["query_value"], partial(LoRA, rank=8))),
    }

    @torch.no_grad()
    def forward() -> None:
        frozen(input_ids=tokens)

    calls = {"frozen forward": forward} | {
        name: step(model, parameters, tokens) for name, (model, parameters) in trained.items()
    }
    for call in calls.values():
        call()
    times = minima(calls, options.rounds)
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    base, reference = times["frozen forward"], "peft LoRA q,v"
    for name, taken in times.items():
        count = sum(p.numel() for p in trained[name][1]) if name in trained else 0
        against = ""
        if name in trained:
            time, size = taken / times[reference], memory[name] / memory[reference]
            against = f"   {time:.2f} x the time and {size:.2f} x the memory of peft"
        print(
            f"{name:<15}{taken * 1e3:9.0f} ms {taken / base:6.2f} x forward {memory[name] / 2**20:8.0f} MiB"
            f"{count:>12,} trained{against}"
        )
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
