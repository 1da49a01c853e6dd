"""Runs and artefacts as models of another library: what is exported, and that it is the live model.

`prepare_run` takes a module with its backbone, adapters and all, `prepare_files` a model that lies in files alone. The
library's own model, with the adapters folded into its weights, must give the outputs of the backbone with the adapters
attached; `export_files.write` writes it and compares once more, in a fresh process.

Memory: one more copy of the exported part beside the loaded run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fulgurite.backbones.compressed_models import load_model
from fulgurite.backbones.foreign_models import CONFIG, QUANTIZED, library_of, model_of, read_config
from fulgurite.backbones.fresh import TOLERANCE
from fulgurite.backbones.parts import Part
from fulgurite.backbones.probe import probe
from fulgurite.backbones.reload import TEXT, outputs, relative_error, tokens_of
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints import MismatchError, RefusedError
from fulgurite.checkpoints.sources import Source
from fulgurite.methods.adapters.base import FoldError
from fulgurite.methods.adapters.folding import fold
from fulgurite.methods.adapters.peft_format import to_peft
from fulgurite.methods.quantization.rotation_record import ROTATION, RotationRecord

Target = Literal["hf", "open_clip", "timm", "peft"]
AdapterChoice = Literal["fold", "separate"]
StateDict = dict[str, Tensor]
OWN = "fulgurite"  # the library, in the facts of a folder in this package's own layout


@dataclass
class Prepared:
    """One export, decided and compared, not yet written.

    Args:
        to: the library.
        model: its own model; for peft the model under the adapters.
        inputs: of the forward pass that is compared.
        expected: outputs of the live model; None where the files are all there is.
        tokens: ids of `reload.TEXT` by the model's tokenizer.
        tokenizer: written beside the weights, where ``like`` is None.
        like: folder whose configuration, tokenizer and processor files go along.
        architecture: the library's name of the model.
        base: model that peft's adapters stand on.
        base_digest: fingerprint of the backbone under peft's adapters.
        peft: peft's configuration and tensors.
        rest: what of the backbone no library has a place for.
        adapters: the adapters left as they are, ``<site>.<tensor>``.
        error: largest relative difference to the live model so far.
        facts: for the manifest.
    """

    to: Target
    model: Any
    inputs: StateDict
    expected: StateDict | None = None
    tokens: list[int] | None = None
    tokenizer: Any = None
    like: Path | None = None
    architecture: str | None = None
    base: str = ""
    base_digest: str = ""
    peft: tuple[dict[str, Any], StateDict] | None = None
    rest: StateDict = field(default_factory=dict)
    adapters: StateDict = field(default_factory=dict)
    error: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def prepare_files(
    source: Source, to: Target, like: Path | None, architecture: str | None, inputs: StateDict | None = None
) -> Prepared:
    """An export of a model that lies in files: the merge of two Hugging Face folders, or one quantized in our layout.

    Args:
        source: its tensors, named as in the library's files.
        to: the library.
        like: folder with its configuration; the source's own folder where that has one.
        architecture: the library's name of the model, where no folder says it.
        inputs: of the forward pass that is compared; drawn where None.

    Raises:
        RefusedError: the files are another library's, or packed as transformers loads them with another package, or of
            a model that is none of its library's any more.
        MissingError: nothing says how the model is built.
        MismatchError: the tensors are not those of the model.
    """
    if to == "peft":
        raise RefusedError(f"{source.path} holds a model's weights, no adapter set: peft takes the adapters of a run")
    own = source.path if source.path.is_dir() and library_of(source.path) else None
    like = like or own
    found = None if like is None else library_of(like)
    if like is not None and found is None:
        raise RefusedError(f"--like {like}: no config.json or open_clip_config.json of a known library lies in it")
    if found not in (None, to):
        raise RefusedError(f"{like} is a model of {found}, and is not converted to {to}: use --to {found}")
    if found == "hf" and QUANTIZED in read_config(like / CONFIG):
        raise RefusedError(
            f"{like} is quantized, which transformers loads as it is: load it by transformers itself, or quantize with "
            "--format own and export that, as a dense model"
        )
    if like is not None and architecture is not None:
        raise RefusedError(f"--architecture {architecture}: {like} says already what the model is; leave it out")
    model, facts = model_in(source, to, like, architecture)
    tokens = None if like is None else tokens_of(str(like))
    inputs = inputs or probe(to, model)
    return Prepared(to, model, inputs, tokens=tokens, like=like, architecture=architecture, facts=facts)


def model_in(
    source: Source, to: Target, like: Path | None, architecture: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The library's model in files, dense where they are in this package's own layout, and facts that go along.

    Raises:
        RefusedError: it was rotated in a way that its library does not know.
        CheckpointError: the tensors are not those of the model.
    """
    facts = {} if source.manifest is None else source.manifest.facts
    rotation = {name: value for name, value in facts.items() if name == ROTATION}
    for record in map(RotationRecord.from_data, rotation.values()):
        norm = next((name for name, was in record.fused.items() if was == "layer"), None)
        if record.online or norm:
            what = f"{next(iter(record.online))} rotates its input" if record.online else f"{norm} is another norm now"
            raise RefusedError(
                f"{source.path} is rotated, so that {what}, which transformers does not know: load it by "
                "fulgurite.load_model, or quantize with --rotation.heads merged --rotation.feed_forward false, or "
                "without a rotation where the model has LayerNorms"
            )
    if facts.get("library") == OWN:
        return load_model(source.path), rotation
    return model_of(to, source.tensors, like, architecture), rotation


def prepare_run(
    module: nn.Module,
    to: Target,
    sets: str | Mapping[str, float] | None = None,
    part: str | None = None,
    adapters: AdapterChoice = "fold",
    dtype: torch.dtype | None = None,
    inputs: StateDict | None = None,
) -> Prepared:
    """An export of a part of a module's backbone with the adapters that stand beside it.

    Args:
        module: in evaluation mode, on the CPU; its adapters are rounded to ``dtype`` for peft.
        to: the library.
        sets: name of an adapter set, or weights of several that sum to 1; None where there is only one.
        part: which of the backbone's parts that ``to`` can load; None where there is only one.
        adapters: ``fold`` into the weights, or leave the weights as they are and write the set beside them.
        dtype: of the files.
        inputs: of the forward pass that is compared; drawn where None.

    Raises:
        RefusedError: no such part or set, or an adapter that the layout cannot hold; the text names the way out.
        MismatchError: the folded model is not the live one.
    """
    backbone = getattr(module, "backbone", None)
    if backbone is None:
        raise RefusedError(f"{type(module).__name__} has no backbone, so no part of it is a model of another library")
    chosen = part_of(backbone, to, part)
    others = [p for p in backbone.parts() if p is not chosen and p.name != chosen.name]
    weights = weights_of(module, sets)
    bank = getattr(module, "bank", None) if weights else None
    sites = [] if bank is None else [site for site in bank.sites if not any(other.holds(site) for other in others)]
    inside = [site for site in sites if chosen.holds(site)]
    prepared = Prepared(to, chosen.build().float().eval(), {}, tokenizer=chosen.tokenizer)
    if to == "peft":
        prepared.peft, prepared.base = _peft(bank, chosen, weights, inside, dtype), resolve_source(chosen.base or "")
        prepared.base_digest = backbone.fingerprint
        sites = [site for site in sites if site not in inside]
    elif adapters == "separate" and bank is not None:
        prepared.adapters, sites = _adapters(bank, weights, sites), []
    tensors = backbone.state_dict() | _folded(bank, backbone, weights, sites)
    used = set(chosen.fill(prepared.model, tensors))
    prepared.rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not any(other.holds(name) for other in others)
    }
    prepared.inputs = inputs or probe("hf" if to == "peft" else to, prepared.model)
    call = "hf" if to == "peft" else to
    with _using(bank, None if prepared.adapters else weights, len(next(iter(prepared.inputs.values())))):
        prepared.expected = outputs(call, chosen.live, prepared.inputs)
    if to != "peft":
        _require_equal(outputs(call, prepared.model, prepared.inputs), prepared)
    if chosen.tokenizer is not None and to == "hf":
        prepared.tokens = list(chosen.tokenizer(TEXT)["input_ids"])
    prepared.facts = {
        "part": chosen.name,
        "sets": dict(weights),
        "folded": sites,
        "rest": sorted(prepared.rest),
        "other_parts": [other.name for other in others],
    }
    return prepared


def part_of(backbone: nn.Module, to: Target, name: str | None) -> Part:
    """The part of a backbone that a library loads. Raises `RefusedError`, which lists what there is."""
    library = "hf" if to == "peft" else to
    parts = backbone.parts()
    held = ", ".join(f"{p.name} ({p.library})" for p in parts)
    if not parts:
        raise RefusedError(
            f"{type(backbone).__name__} is not exported: no part of it is a model that {library} loads. fulgurite.load "
            "gives the module with its weights, and index and search read its runs"
        )
    fitting = [p for p in parts if p.library == library and name in (None, p.name)]
    if len(fitting) != 1:
        problem = "no part" if not fitting else f"{len(fitting)} parts"
        named = "" if name is None else f" named {name!r}"
        raise RefusedError(
            f"{type(backbone).__name__} has {problem} that {library} loads{named}; its parts are: {held}. "
            "Choose with --to and --part"
        )
    return fitting[0]


def weights_of(module: nn.Module, sets: str | Mapping[str, float] | None) -> dict[str, float]:
    """Adapter sets of the bank and their weights; the current stage's values are in the live set.

    Raises:
        RefusedError: there is no such set, it is not trained yet, or there are several and none was chosen.
    """
    bank = getattr(module, "bank", None)
    if bank is None:
        if sets is not None:
            raise RefusedError(f"--set {sets}: {type(module).__name__} has no adapter sets")
        return {}
    stages = [stage.name for stage in getattr(module, "stages", ())]
    stage = getattr(module, "stage", len(stages) - 1)
    current = stages[stage] if 0 <= stage < len(stages) else None
    trained = [name for name in stages[: stage + 1] if name in bank.names]
    if sets is None:
        if len(trained) > 1 and not all(is_live(bank, name) for name in trained if name != current):
            raise RefusedError(
                f"the run holds {len(trained)} trained adapter sets, {', '.join(trained)}, which it mixes anew for "
                f"every sample; one folder holds one model. Choose with --set {trained[-1]}, or mix with --set "
                f"'{{{trained[0]}: 0.5, {trained[-1]}: 0.5}}'"
            )
        return {bank.live: 1.0}
    weights = {sets: 1.0} if isinstance(sets, str) else {str(name): float(share) for name, share in sets.items()}
    for name in weights:
        if name not in bank.names and name != current:
            raise RefusedError(f"no adapter set {name!r}; there are {', '.join(bank.names)}")
        if name in stages[stage + 1 :]:
            raise RefusedError(f"the adapter set {name!r} is not trained yet; there are {', '.join(trained)}")
    if abs(sum(weights.values()) - 1) > 1e-6:
        raise RefusedError(f"--set {dict(weights)}: the weights sum to {sum(weights.values())}, not to 1")
    named: dict[str, float] = {}
    for name, share in weights.items():
        held = bank.live if name == current else name
        named[held] = named.get(held, 0.0) + share
    return named


def is_live(bank: Any, name: str) -> bool:
    """Whether a set has the values of the live one, as all have where they were merged."""
    pairs = zip(bank.parameters_of(name), bank.parameters_of(bank.live), strict=True)
    return all(torch.equal(own, live) for own, live in pairs)


def _folded(bank: Any, backbone: nn.Module, weights: Mapping[str, float], sites: list[str]) -> StateDict:
    if bank is None or not sites:
        return {}
    try:
        return fold(bank, backbone, weights, sites)
    except FoldError as error:
        raise RefusedError(
            f"{error}. Folding is exact for LoRA, Replace and changes of weights; --adapters separate writes the "
            "weights as they are, and the set beside them"
        ) from error


def _peft(
    bank: Any, part: Part, weights: Mapping[str, float], sites: list[str], dtype: torch.dtype | None
) -> tuple[dict[str, Any], StateDict]:
    """peft's configuration and tensors of the one set; its values are rounded to ``dtype`` in place."""
    root = part.places.get("")
    if part.base is None or root is None:
        raise RefusedError(
            f"peft's adapters stand on a model that can be loaded from a folder or hub name, which the part "
            f"{part.name!r} is not: use --to hf, which folds them"
        )
    if bank is None or len(weights) != 1:
        raise RefusedError("peft's layout holds one adapter set: choose one with --set, or fold several with --to hf")
    (name,) = weights
    try:
        config, tensors = to_peft(bank, name, resolve_source(part.base), root, set(sites))
    except ValueError as error:
        raise RefusedError(f"{error}. --to hf --adapters separate writes any kind") from error
    if dtype is None:
        return config, tensors
    for tensor in tensors.values():
        tensor.copy_(tensor.to(dtype))
    return config, {key: tensor.to(dtype) for key, tensor in tensors.items()}


def _adapters(bank: Any, weights: Mapping[str, float], sites: list[str]) -> StateDict:
    """The tensors of the one set, ``<site>.<tensor>``."""
    if len(weights) != 1:
        raise RefusedError("--adapters separate writes one adapter set: choose one with --set")
    (name,) = weights
    own = bank.adapters_of(name)
    return {f"{s}.{key}": t.detach() for s in sites for key, t in own[s].state_dict().items()}


@contextmanager
def _using(bank: Any, weights: Mapping[str, float] | None, num_samples: int) -> Iterator[None]:
    """One set, or a mixture alike for all samples, or (None) the bare backbone, active in the block."""
    if bank is None:
        yield
        return
    names = list(weights or ())
    chosen: Any = names[0] if len(names) == 1 else None
    if len(names) > 1:
        chosen = torch.tensor([list(weights.values())] * num_samples, dtype=torch.float32)
    with bank.use(chosen, names if len(names) > 1 else None):
        yield


def _require_equal(found: StateDict, prepared: Prepared) -> None:
    """Keep the outputs that both have, and refuse those that differ."""
    shared = {name: tensor for name, tensor in prepared.expected.items() if name in found}
    errors = {name: relative_error(found[name], tensor) for name, tensor in shared.items()}
    prepared.error = max(errors.values(), default=float("inf"))
    if not prepared.error <= TOLERANCE:
        raise MismatchError(
            f"the model to export is not the live one, relative differences of outputs: {errors}, allowed are "
            f"{TOLERANCE:.0e}; nothing was written"
        )
    prepared.expected = shared


TARGETS: tuple[Target, ...] = get_args(Target)
