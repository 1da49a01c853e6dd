"""A model folder loaded by the library that it is for, and what the model makes of given inputs.

Run as a script, in a process that has seen nothing of this package, it loads a folder and compares:

    python -P reload.py '{"library": "hf", "folder": ..., ...}' < tensors

The tensors are safetensors of ``input.<name>`` and ``output.<name>``; the last line of its output is JSON, the fields
of `Comparison`. The process that exports imports `outputs` from here, so that both call a model alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Stored = Literal["dense", "compressed-tensors", "own"]

TEXT = "two dogs run over the green grass"  # what tokenizers are compared on


@dataclass
class Comparison:
    """What a fresh process found.

    Args:
        missing: names that the model has and the files have not.
        unexpected: names that the files have and the model has not.
        errors: by output, the norm of the difference over the norm of what was expected.
        tokens: ids of `TEXT` by the folder's tokenizer, None without one.
        tied: groups of names that are one tensor.
        digests: of every tensor of the state dict, in float32.
        versions: of the libraries.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    tokens: list[int] | None = None
    tied: list[list[str]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def outputs(library: str, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All floating tensors that a forward pass gives, by name, as float32.

    Args:
        library: ``hf``, ``timm``, ``open_clip`` or ``peft``.
        model: one of its models, or a function that is called as one.
        inputs: by the name of the argument; timm's are ``pixels``, open_clip's ``image`` and ``text``.
    """
    if library == "timm":
        return {"output": model(inputs["pixels"]).float()}
    if library == "open_clip":
        found = model(inputs["image"], inputs["text"])
        named = found if isinstance(found, dict) else dict(zip(("image_features", "text_features"), found))
    else:
        found = model(**inputs)
        named = dict(found.items()) if hasattr(found, "items") else {"output": found}
    floats = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point() and n != "loss"}
    return {name: tensor.float().contiguous() for name, tensor in floats.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    return float(error) if error.isfinite() else float("inf")


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of the state dict, floating ones in float32: a probe does not reach all of them."""
    found = {}
    for name, tensor in model.state_dict().items():
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        found[name] = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return found


def load(
    library: str, folder: str, model_class: str = "", base: str = "", stored: Stored = "dense"
) -> tuple[nn.Module, list[str], list[str]]:
    """The model of a folder in float32 and evaluation mode, the names that it lacks, and those that it has no use for.

    Args:
        library: what loads it.
        folder: what was exported.
        model_class: of transformers.
        base: model that peft's adapters stand on.
        stored: how its weights lie in the folder.
    """
    if stored == "own":
        from fulgurite.backbones.compressed_models import load_model

        return load_model(folder).float(), [], []
    if library == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval(), [], []
    if library == "open_clip":
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).float().eval(), [], []
    import transformers

    cls = getattr(transformers, model_class)
    if stored == "compressed-tensors":
        return load_compressed(cls, folder)
    model, info = cls.from_pretrained(base or folder, dtype=torch.float32, output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if library == "peft":
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        model = PeftModel.from_pretrained(model, folder)
        with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as file:
            stored, own = set(file.keys()), set(get_peft_model_state_dict(model))
        missing, unexpected = sorted(own - stored), sorted(stored - own)
    return model.float().eval(), missing, unexpected


def load_compressed(cls: Any, folder: str) -> tuple[nn.Module, list[str], list[str]]:
    """`load` of a folder that transformers reads by compressed-tensors: rounded to its own type, then float32."""
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        for name in ("weight_scale", "weight_shape"):
            module._parameters.pop(name, None)
    nn.Module.float(model)  # transformers refuses its own for what was quantized
    return model.eval(), sorted(info["missing_keys"]), sorted(info["unexpected_keys"])


def tokens_of(folder: str) -> list[int] | None:
    """Ids of `TEXT` by the tokenizer of a folder; None where it has none."""
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])


def compare(request: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Comparison:
    """Load a folder and compare its model with what was expected.

    Args:
        request: ``library``, ``folder``, ``model_class``, ``base`` and ``stored``, the arguments of `load`.
        tensors: ``input.<name>`` and ``output.<name>``.
    """
    library, folder = request["library"], request["folder"]
    how = (request["model_class"], request["base"], request["stored"])
    model, missing, unexpected = load(library, folder, *how)
    inputs = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
    expected = {n.removeprefix("output."): t for n, t in tensors.items() if n.startswith("output.")}
    found, nothing = outputs(library, model, inputs), torch.zeros(0)
    done = Comparison(missing, unexpected, tied=tied_names(model), tokens=tokens_of(folder), digests=digests(model))
    done.errors = {name: relative_error(found.get(name, nothing), tensor) for name, tensor in expected.items()}
    used = {"hf": ("transformers",), "peft": ("transformers", "peft")}.get(library, (library,))
    done.versions = {name: str(sys.modules[name].__version__) for name in ("torch", *used)}
    return done


def main() -> None:
    """See the module's docstring."""
    from safetensors.torch import load as load_bytes

    done = compare(json.loads(sys.argv[1]), load_bytes(sys.stdin.buffer.read()))
    print("\n" + json.dumps(asdict(done)))


if __name__ == "__main__":
    main()
