"""What trains beside a frozen backbone: kinds of adapters, exact per-sample mixing, and their bank.

`bank.AdapterBank` owns named sets; a kind is one file with one `base.Adapter` subclass.
"""

__all__ = ["bank", "base", "bottleneck", "delta", "lora", "mixing", "peft_format", "replace", "report", "soft_prompt"]
