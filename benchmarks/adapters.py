"""A training step with every kind of adapter, against the frozen forward, full fine-tuning and peft's LoRA.

    python benchmarks/adapters.py [--models bert vit] [--rows lora ..] [--rounds 5] [--layers 12] [--threads 2]

BERT-base with 128 tokens and ViT-B/16 with 224 x 224 pixels, random weights, 8 samples, AdamW, no dropout. All forms
run interleaved in this process. Times are minima over the rounds; those against peft's same placement are medians of
the pairs of a round. Memory is the peak of what one step allocates, gradients included, beside the optimizer's state,
which has its own column, as has what a checkpoint stores. Inference is the forward pass without gradients with the
adapters, over the frozen one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from measure import load, machine, peak_bytes
from torch import Tensor, nn

from fulgurite.backbones.side_blocks import side_blocks_of
from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter
from fulgurite.methods.adapters.folding import fold
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.places import Placement
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec

MIB = 1 << 20
SAMPLES, TOKENS = 8, 128
# Of the stack of blocks: attention's three inputs, its output, and the two linear layers after it.
PARTS = {
    "bert": (
        r"encoder\.layer\.\d+",
        (r"attention\.self\.query", r"attention\.self\.value", r"attention\.self\.key"),
        r"attention\.output\.dense",
        (r"intermediate\.dense", r"output\.dense"),
    ),
    "vit": (
        r"layers\.\d+",
        (r"attention\.q_proj", r"attention\.v_proj", r"attention\.k_proj"),
        r"attention\.o_proj",
        (r"mlp\.fc1", r"mlp\.fc2"),
    ),
}
BARS = {
    "LoRA q,v": "peft's time and memory (10 %)",
    "LoRA all": "2.3x forward, 0.80 of peft's memory",
    "bottleneck /8": "2.3x forward",
    "LST /8": "1.25x forward, 25 % of full's memory",
}


@dataclass
class Form:
    """One way to train: the model as it runs, what trains, and what the placement is compared with."""

    model: nn.Module
    parameters: list[nn.Parameter]
    against: str | None = None
    bank: AdapterBank | None = None


def spec_of(model: nn.Module, family: str, layers: int) -> ModelSpec:
    """The points that the forms use."""
    block, inputs, output, hidden = PARTS[family]
    owners = [name for name, m in model.named_modules() if [*m.parameters(recurse=False)]]
    return ModelSpec(
        towers=(),
        points={
            "block": (block, layers),
            "query_value": (rf"{block}\.({'|'.join(inputs[:2])})", 2 * layers),
            "linear": (rf"{block}\.({'|'.join([*inputs, output, *hidden])})", 6 * layers),
            "adapted_output": (rf"{block}\.({output}|{hidden[1]})", 2 * layers),
            "parameters": ("|".join(name.replace(".", r"\.") for name in owners), len(owners)),
        },
    )


def forms_of(frozen: nn.Module, family: str, layers: int) -> dict[str, Callable[[], Form]]:
    """Every form by its name."""
    from peft import LoraConfig, get_peft_model

    spec = spec_of(frozen, family, layers)

    def full() -> Form:
        model = copy.deepcopy(frozen).requires_grad_(True)
        return Form(model, list(model.parameters()))

    def peft(point: str) -> Form:
        names = spec.point_names(frozen, point)
        model = get_peft_model(copy.deepcopy(frozen), LoraConfig(r=8, lora_alpha=16, target_modules=names))
        return Form(model, [p for p in model.parameters() if p.requires_grad])

    def banked(point: str, kind: Callable[..., nn.Module], against: str | None = None) -> Form:
        model = copy.deepcopy(frozen)
        bank = AdapterBank(model, [Placement([point], kind)], sets=(), spec=spec).eval()  # no dropout either
        return Form(model, bank.parameters_of("live"), against, bank)

    mask = partial(SparseMask, density=0.005, score="random")
    ladder = partial(LadderSide, reduction=8, side_blocks=side_blocks_of, init="random")
    return {
        "full": full,
        "peft LoRA q,v": partial(peft, "query_value"),
        "LoRA q,v": partial(banked, "query_value", partial(LoRA, rank=8), "peft LoRA q,v"),
        "peft LoRA all": partial(peft, "linear"),
        "LoRA all": partial(banked, "linear", partial(LoRA, rank=8), "peft LoRA all"),
        "bottleneck /8": partial(banked, "adapted_output", partial(Bottleneck, reduction=8)),
        "Compacter n=2": partial(banked, "adapted_output", partial(Compacter, reduction=8, division=2)),
        "LST /8": partial(banked, "block", ladder),
        "FISH 0.5 %": partial(banked, "parameters", mask),
    }


def forward_of(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: model(**inputs).last_hidden_state


def step_of(form: Form, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """One training step as a call."""

    def call() -> None:
        forward_of(form.model, inputs)().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def inferred(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            forward_of(model, inputs)()

    return call


def folded(form: Form, frozen: nn.Module) -> nn.Module | None:
    """The plain model with the adapters in its weights; None where they have no such form."""
    try:
        tensors = fold(form.bank, form.model, {"live": 1.0}, form.bank.sites)
    except ValueError:
        return None
    model = copy.deepcopy(frozen)
    model.load_state_dict(tensors, strict=False)  # the names are the model's own; the others stay
    return model


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, round by round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return taken


def size_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def compare(family: str, layers: int, rounds: int, rows: list[str] | None) -> None:
    """Measure one model and print its table."""
    frozen, inputs = model_of(family, layers)
    forms = {n: make() for n, make in forms_of(frozen, family, layers).items() if not rows or matches(n, rows)}
    optimizers = {name: torch.optim.AdamW(form.parameters, lr=1e-4) for name, form in forms.items()}
    steps = {name: step_of(form, optimizers[name], inputs) for name, form in forms.items()}
    for call in steps.values():
        call()
    taken = interleaved({"frozen forward": inferred(frozen, inputs), **steps}, rounds)
    base = min(taken["frozen forward"])
    memory = {name: peak_bytes(call) for name, call in steps.items()}
    passes = {name: inferred(form.model, inputs) for name, form in forms.items() if form.bank is not None}
    plain = {name: model for name in passes if (model := folded(forms[name], frozen)) is not None}
    passes |= {f"{name}, folded": inferred(model, inputs) for name, model in plain.items()}
    inference = interleaved({"frozen": inferred(frozen, inputs), **passes}, rounds)
    print(f"\n{family}: forward {1e3 * base:.0f} ms, {peak_bytes(inferred(frozen, inputs)) / MIB:.0f} MiB")
    print(
        f"{'':15}{'trained':>12}{'ms':>7}{'x forward':>10}{'MiB':>7}{'state':>7}{'stored':>8}{'x peft':>14}  inference"
    )
    for name, form in forms.items():
        state = size_of([t for each in optimizers[name].state.values() for t in each.values() if t.dim()])
        stored = [*form.parameters]
        if form.bank is not None:
            stored = list(form.bank.sets["live"].state_dict().values())
        pair = ""
        if form.against in forms:
            ratio = median(own / other for own, other in zip(taken[name], taken[form.against]))
            pair = f"{ratio:.2f} / {memory[name] / memory[form.against]:.2f}"
        over = [
            f"{label} {min(inference[key]) / min(inference['frozen']):.2f}x"
            for label, key in (("", name), ("folded", f"{name}, folded"))
            if key in inference
        ]
        least = min(taken[name])
        print(
            f"{name:15}{sum(p.numel() for p in form.parameters):12,}{1e3 * least:7.0f}{least / base:10.2f}"
            f"{memory[name] / MIB:7.0f}{state / MIB:7.1f}{size_of(stored) / MIB:8.2f}{pair:>14}  {', '.join(over)}"
            + (f"   (bar: {BARS[name]})" if name in BARS else "")
        )
    if {"full", "LST /8"} <= forms.keys():
        print(f"LST's memory is {memory['LST /8'] / memory['full']:.1%} of full fine-tuning's")


def matches(name: str, rows: list[str]) -> bool:
    return any(word.lower() in name.lower() for word in rows)


def model_of(family: str, layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A frozen model with random weights, and a batch."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    if family == "bert":
        model: nn.Module = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
        inputs = {"input_ids": torch.randint(1000, 30000, (SAMPLES, TOKENS))}
    else:
        model = ViTModel(ViTConfig(num_hidden_layers=layers), add_pooling_layer=False)
        inputs = {"pixel_values": torch.randn(SAMPLES, 3, 224, 224)}
    return model.requires_grad_(False).eval(), inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", nargs="+", help="words that a row's name holds; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import peft
    import transformers

    print(f"{machine(options.threads)}; transformers {transformers.__version__}, peft {peft.__version__}")
    for family in options.models:
        compare(family, options.layers, options.rounds, options.rows)
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
