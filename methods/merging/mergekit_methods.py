"""mergekit's merge methods (0.1.5): their parameters, what they take, and which merger does the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fulgurite.methods.merging.arcee_fusion import ArceeFusion
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.breadcrumbs import Breadcrumbs
from fulgurite.methods.merging.combine import Then
from fulgurite.methods.merging.dare import Dare
from fulgurite.methods.merging.della import Della
from fulgurite.methods.merging.karcher import Karcher
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.multislerp import MultiSlerp
from fulgurite.methods.merging.nearswap import NearSwap
from fulgurite.methods.merging.nuslerp import NuSlerp
from fulgurite.methods.merging.ram import Ram
from fulgurite.methods.merging.sce import Sce
from fulgurite.methods.merging.slerp import Slerp
from fulgurite.methods.merging.ties import Ties

REQUIRED = object()
Own = Sequence[Mapping[str, Any]]
Built = tuple[Merger, list[float]]
Build = Callable[[Mapping[str, Any], Own], Built]


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Args:
        kind: of its value.
        scope: one for all models, one for each of ``all``, or for each of the ``others`` than the base.
        default: where it is not given.
    """

    kind: type
    scope: Literal["shared", "all", "others"] = "shared"
    default: Any = REQUIRED


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        build: parameters that are shared, and those of every operand but the base -> merger, and a weight for each.
        parameters: by name.
        base: whether it takes one.
        fewest, most: models, the base included.
        base_is_expert: the base is the first of the models that are merged, and no base of theirs.
    """

    build: Build
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["ignored", "required", "optional"] = "required"
    fewest: int = 1
    most: int | None = None
    base_is_expert: bool = False

    def problems(self, models: Sequence[str], base: str | None) -> list[str]:
        """What is wrong with the models of a slice."""
        found = [f"{model} is named twice" for model in dict.fromkeys(models) if models.count(model) > 1]
        count, most = len(models), self.most
        if self.base != "ignored" and base is not None and base not in models:
            found.append(f"the base {base} is not among the sources")
        if self.base == "required" and base is None:
            found.append("no base_model")
        fewest = self.fewest - (self.base == "optional" and base is None)
        most = most and most - (self.base == "optional" and base is None)
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"at most {most}"
            found.append(f"{count} models, it takes {wanted}")
        return found


def weights(own: Own) -> list[float]:
    """``weight`` of each."""
    return [values["weight"] for values in own]


def alike(own: Own, name: str) -> Any:
    """The value that all have, or one for each."""
    values = [parameters[name] for parameters in own]
    return values[0] if len(set(values)) == 1 else values


def _linear(shared: Mapping[str, Any], own: Own) -> Built:
    return Average(shared["normalize"]), weights(own)


def density_of(own: Own) -> Any:
    """``density`` as `alike`, in [0, 1]: mergekit keeps all above 1, and nothing below 0."""
    return alike([{"density": min(max(values["density"], 0.0), 1.0)} for values in own], "density")


def _task_arithmetic(shared: Mapping[str, Any], own: Own) -> Built:
    return TaskArithmetic(shared["lambda"], shared["normalize"]), weights(own)


def _ties(shared: Mapping[str, Any], own: Own) -> Built:
    if shared["rescale"]:
        raise ValueError("rescale: true is not supported with ties")
    aggregate = "mean" if shared["normalize"] else "sum"
    return Ties(density_of(own), shared["lambda"], aggregate, dialect="mergekit"), weights(own)


def combined(shared: Mapping[str, Any], elects: bool) -> dict[str, Any]:
    """How thinned changes are combined, and what makes up for thinning: arguments of the mergers that thin out."""
    then: Then = "ties" if elects else "average" if shared["normalize"] else "task_arithmetic"
    return {
        "rescale": "l1" if shared["rescale"] else "none",
        "then": then,
        "lam": shared["lambda"],
        "aggregate": "mean" if shared["normalize"] else "sum",
        "dialect": "mergekit",
    }


def _dare(elects: bool) -> Build:
    def build(shared: Mapping[str, Any], own: Own) -> Built:
        density = density_of(own)
        drop = [1 - value for value in density] if isinstance(density, list) else 1 - density
        return Dare(drop, **combined(shared, elects)), weights(own)

    return build


def _della(elects: bool) -> Build:
    def build(shared: Mapping[str, Any], own: Own) -> Built:
        return Della(density_of(own), alike(own, "epsilon"), **combined(shared, elects)), weights(own)

    return build


def _breadcrumbs(elects: bool) -> Build:
    def build(shared: Mapping[str, Any], own: Own) -> Built:
        return Breadcrumbs(density_of(own), alike(own, "gamma"), **combined(shared, elects)), weights(own)

    return build


def _nearswap(shared: Mapping[str, Any], own: Own) -> Built:
    return NearSwap(shared["t"]), [1.0]


def _arcee_fusion(shared: Mapping[str, Any], own: Own) -> Built:
    return ArceeFusion(), [1.0]


def _sce(shared: Mapping[str, Any], own: Own) -> Built:
    return Sce(min(max(shared["select_topk"], 0.0), 1.0)), [1.0] * len(own)


def _ram(shared: Mapping[str, Any], own: Own) -> Built:
    return Ram(shared["epsilon"]), [1.0] * len(own)


def _ramplus(shared: Mapping[str, Any], own: Own) -> Built:
    return Ram(shared["epsilon"], True, shared["r"], shared["alpha"]), [1.0] * len(own)


def _slerp(shared: Mapping[str, Any], own: Own) -> Built:
    return Slerp(shared["t"]), [1.0, 1.0]


def _multislerp(task_vectors: bool) -> Build:
    def build(shared: Mapping[str, Any], own: Own) -> Built:
        if not shared["normalize_weights"]:
            raise ValueError("normalize_weights: false is not supported")
        if shared["eps"] != 1e-8:
            raise ValueError("eps: not supported")
        return MultiSlerp(task_vectors), weights(own)

    return build


def _nuslerp(task_vectors: bool) -> Build:
    def build(shared: Mapping[str, Any], own: Own) -> Built:
        dim = 0 if shared["nuslerp_row_wise"] else -1
        return NuSlerp(None, shared["nuslerp_flatten"], dim, task_vectors), weights(own)

    return build


def _karcher(shared: Mapping[str, Any], own: Own) -> Built:
    return Karcher(shared["max_iter"], shared["tol"]), [1.0] * len(own)


def _model_stock(shared: Mapping[str, Any], own: Own) -> Built:
    return ModelStock("filter" if shared["filter_wise"] else "tensor", clamp=False), [1.0] * len(own)


def _passthrough(shared: Mapping[str, Any], own: Own) -> Built:
    return Average(normalize=False), [1.0 if values["scale"] is None else values["scale"] for values in own]


WEIGHT = {"weight": Parameter(float, "others")}
SUM = {
    "lambda": Parameter(float, default=1.0),
    "normalize": Parameter(bool, default=False),
    "rescale": Parameter(bool, default=False),
    "int8_mask": Parameter(bool, default=False),
    "density": Parameter(float, "others", 1.0),
    **WEIGHT,
}

DELLA = {**SUM, "rescale": Parameter(bool, default=True), "epsilon": Parameter(float, "others", 0.15)}
BREADCRUMBS = {**SUM, "gamma": Parameter(float, "others", 0.01)}
RAM = {"epsilon": Parameter(float, default=1e-5)}


def method(name: str, has_base: bool) -> Method:
    """A method by mergekit's name.

    Raises:
        LookupError: there is none here.
    """
    table = {
        "linear": Method(
            _linear, {"weight": Parameter(float, "all"), "normalize": Parameter(bool, default=True)}, "ignored"
        ),
        "task_arithmetic": Method(_task_arithmetic, SUM),
        "ties": Method(_ties, {**SUM, "normalize": Parameter(bool, default=True)}),
        "dare_linear": Method(_dare(False), {**SUM, "rescale": Parameter(bool, default=True)}),
        "dare_ties": Method(_dare(True), {**SUM, "rescale": Parameter(bool, default=True)}),
        "della": Method(_della(True), {**DELLA, "normalize": Parameter(bool, default=True)}),
        "della_linear": Method(_della(False), DELLA),
        "breadcrumbs": Method(_breadcrumbs(False), BREADCRUMBS),
        "breadcrumbs_ties": Method(_breadcrumbs(True), BREADCRUMBS),
        "sce": Method(
            _sce, {"select_topk": Parameter(float, default=1.0), "int8_mask": Parameter(bool, default=False)}
        ),
        "ram": Method(_ram, RAM),
        "ramplus_tl": Method(
            _ramplus, {**RAM, "r": Parameter(float, default=0.1), "alpha": Parameter(float, default=0.2)}
        ),
        "nearswap": Method(_nearswap, {"t": Parameter(float)}, fewest=2, most=2),
        "arcee_fusion": Method(_arcee_fusion, fewest=2, most=2),
        "slerp": Method(_slerp, {"t": Parameter(float)}, fewest=2, most=2, base_is_expert=True),
        "nuslerp": Method(
            _nuslerp(has_base),
            {
                **WEIGHT,
                "nuslerp_row_wise": Parameter(bool, default=False),
                "nuslerp_flatten": Parameter(bool, default=True),
            },
            "optional",
            3,
            3,
        ),
        "multislerp": Method(
            _multislerp(has_base),
            {
                **WEIGHT,
                "normalize_weights": Parameter(bool, default=True),
                "eps": Parameter(float, default=1e-8),
            },
            "optional",
            2,
        ),
        "karcher": Method(
            _karcher, {"max_iter": Parameter(int, default=10), "tol": Parameter(float, default=1e-5)}, "ignored"
        ),
        "model_stock": Method(_model_stock, {"filter_wise": Parameter(bool, default=False)}, fewest=3),
        "passthrough": Method(_passthrough, {"scale": Parameter(float, "all", None)}, "ignored", most=1),
    }
    if name not in table:
        raise LookupError(f"merge_method: {name!r} is none of {', '.join(table)}")
    return table[name]


# Parameters of any method of mergekit, which passes over those that the chosen one does not have.
KNOWN = {
    *("weight", "normalize", "lambda", "rescale", "int8_mask", "density", "gamma", "epsilon", "t", "nuslerp_row_wise"),
    *("nuslerp_flatten", "normalize_weights", "eps", "max_iter", "tol", "filter_wise", "scale", "select_topk", "r"),
    "alpha",
}
