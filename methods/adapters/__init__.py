"""What trains beside a frozen backbone: kinds of adapters, exact per-sample mixing, and their bank.

`bank.AdapterBank` owns named sets; a kind is one file with one `base.Adapter` subclass.
"""

__all__ = [
    "bank",
    "base",
    "bias",
    "bottleneck",
    "compacter",
    "delta",
    "down_up",
    "folding",
    "hyperformer",
    "ia3",
    "ladder",
    "ladder_start",
    "lora",
    "low_rank",
    "mask_scores",
    "mixing",
    "peft_format",
    "per_task",
    "places",
    "replace",
    "report",
    "sharing",
    "soft_prompt",
    "sparse_mask",
    "tasks",
]
