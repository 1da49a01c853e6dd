"""Placements of every kind in a tiny VL-T5, and the data that they are tried on."""

import functools

from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bias import Bias
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter
from fulgurite.methods.adapters.hyperformer import Hyperformer
from fulgurite.methods.adapters.ia3 import IA3
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.low_rank import LowRankAdapter
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.soft_prompt import SoftPrompt
from fulgurite.methods.adapters.sparse_mask import SparseMask

TASKS = ["nlvr2", "caption"]
LADDER = ["embedded", "encoder_block", "decoder_block", "read_out"]
SUBLAYERS = ["self_attention_output", "cross_attention_output", "feed_forward_output"]
BOTTLENECK = functools.partial(Bottleneck, reduction=4)


def placed(points, make, **options):
    return [Placement(points, functools.partial(make, **options))]


# By the name of a kind, what makes its placements; None trains the backbone itself.
KINDS = {
    "lora": lambda: placed(["attention_query", "attention_value"], LoRA, rank=2),
    "bottleneck": lambda: placed(SUBLAYERS, Bottleneck, reduction=4),
    "compacter": lambda: placed(SUBLAYERS, Compacter, reduction=4, division=2),
    "low_rank": lambda: placed(SUBLAYERS, LowRankAdapter, reduction=4),
    "hyperformer": lambda: placed(SUBLAYERS, Hyperformer, tasks=TASKS, reduction=4, embedding=8, hidden=8, projected=4),
    "ia3": lambda: placed(["attention_key", "attention_value", "feed_forward_output"], IA3),
    "bias": lambda: placed(["linears", "layer_norms"], Bias, new=True),
    "soft_prompt": lambda: placed(["encoder_prompt", "decoder_prompt"], SoftPrompt, length=3, hidden=8),
    "per_task": lambda: placed(["feed_forward_output"], PerTask, kind=BOTTLENECK, tasks=TASKS, shared=["down"]),
    "ladder": lambda: placed(LADDER, LadderSide, reduction=2, merge_last=True),
    "sparse_mask": lambda: placed(["parameters"], SparseMask, density=0.01, samples=4),
    "replace": lambda: placed(["visual_embedding", "layer_norms"], Replace),
    "full": None,
}


def beside_each_other():
    """Every kind that has an adapter per site, each at sites of its own."""
    return [
        *placed(["attention_query", "attention_value"], LoRA, rank=2),
        *placed(["self_attention_output"], Compacter, reduction=4, division=2),
        *placed(["cross_attention_output"], LowRankAdapter, reduction=4),
        *placed(["attention_key", "feed_forward_input"], IA3),
        *placed(["feed_forward_output"], Bottleneck, reduction=4),
        *placed(["layer_norms"], Bias, new=True),
        *placed(["encoder_prompt", "decoder_prompt"], SoftPrompt, length=3, hidden=8),
        *placed(["visual_embedding"], Replace),
    ]
