"""Where things are in a causal language model of transformers inside a backbone, found by how the model is built.

Families differ in names and not in form: token embeddings, a list of blocks of attention and hidden units, a final
norm, an output layer. What a family lacks, as separate layers for queries, has no point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fulgurite.backbones.seq2seq_specs import SLOTS
from fulgurite.methods.structure import ModelSpec, Tower

QUERIES = {"attention_query": "q_proj", "attention_key": "k_proj", "attention_value": "v_proj"}
DENSE = 3  # layers of hidden units at most; there are more of them where there are several experts


def causal_spec(language: Any, projector: str | None = None, projects: nn.Module | None = None) -> ModelSpec:
    """The spec of a backbone that holds a model as ``language``, with one tower ``decoder``.

    Args:
        language: causal language model of transformers, or one of its models of pictures and text.
        projector: name in the backbone of what projects features of pictures; None where there is nothing.
        projects: the module of that name.

    Raises:
        ValueError: it has no one list of as many blocks as its configuration says.
    """
    config, names = language.config.get_text_config(), {id(m): f"language.{n}" for n, m in language.named_modules()}
    decoder, layers = language.get_decoder(), config.num_hidden_layers
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == layers]
    if len(stacks) != 1:
        raise ValueError(f"{type(language).__name__} has {len(stacks)} lists of {layers} blocks, expected one")
    stack = names[id(stacks[0])]
    block = rf"{re.escape(stack)}\.\d+"
    norms = [names[id(child)] for child in decoder.children() if is_norm(child)]
    tables = (language.get_input_embeddings(), language.get_output_embeddings())
    embedding, head = (names[id(table)] for table in tables)
    inner = parts_of_block(stacks[0][0])
    points = {point: (inside(block, found), len(found) * layers) for point, found in inner.items() if found}
    outer = {names[id(decoder)] + f".{name}" for name in owners(decoder)} | {head}
    outer = {name for name in outer if not name.startswith(f"{stack}.")}
    if projector is not None:
        points["projector"] = (re.escape(projector), 1)
        outer |= {f"{projector}.{name}" for name in owners(projects)}
    points["layer_norms"] = with_names(points["layer_norms"], norms)
    points["parameters"] = with_names(points["parameters"], outer)
    points |= {"decoder_block": (block, layers), "embedded": (r"decoder_embedded", 1)}
    points |= {name: SLOTS[name] for name in ("decoder_prompt", "read_out")}
    shared = ([name for point in QUERIES for name in inner[point]], inner["feed_forward_input"])
    final_norm = norms[-1] if norms else None
    tower = Tower("decoder", block, layers, config.hidden_size, embedding=embedding, final_norm=final_norm)
    return ModelSpec(
        towers=(tower,),
        head=head,
        points=points,
        shared_inputs=tuple(tuple(inside(block, [name]) for name in group) for group in shared if len(group) > 1),
        tied=((f"{embedding}.weight", f"{head}.weight"),) if tables[0].weight is tables[1].weight else (),
    )


def parts_of_block(block: nn.Module) -> dict[str, list[str]]:
    """Names inside a block by public place; none where it has no such layers, or more than one can be meant."""
    layers = {name: module for name, module in block.named_modules() if is_matrix(module)}
    attention = [name for name in layers if "attn" in name or "attention" in name]
    hidden = [name for name in layers if name not in attention]
    found = {point: [n for n in attention if n.rpartition(".")[2] == last] for point, last in QUERIES.items()}
    queries = [name for names in found.values() for name in names]
    dense = hidden if 1 < len(hidden) <= DENSE else []
    return {
        **found,
        "self_attention_output": [name for name in attention if name not in queries][-1:],
        "feed_forward_input": dense[:-1],
        "feed_forward_output": dense[-1:],
        "linears": [name for name, module in layers.items() if isinstance(module, nn.Linear)],
        "layer_norms": [name for name, child in block.named_children() if is_norm(child)],
        "parameters": owners(block),
    }


def is_matrix(module: nn.Module) -> bool:
    """Whether it is a linear layer, stored either way."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises, by its class's name."""
    return "Norm" in type(module).__name__


def owners(root: nn.Module) -> list[str]:
    """Names of the modules that hold parameters themselves."""
    return [name for name, module in root.named_modules() if any(True for _ in module.parameters(recurse=False))]


def inside(block: str, names: Sequence[str]) -> str:
    """Pattern of these modules in all blocks of the pattern ``block``."""
    return rf"{block}\.(?:{'|'.join(map(re.escape, names))})"


def with_names(place: tuple[str, int], names: Iterable[str]) -> tuple[str, int]:
    """A place with further modules."""
    found = sorted(names)
    return "|".join([place[0], *map(re.escape, found)]), place[1] + len(found)
