"""Second moments of the inputs of linear layers: X^T X, or only its diagonal, the column energies.

    G = sum_t w_t x_t x_t^T / sum_t w_t        over the rows t (tokens) that are no padding, w_t = 1 by default

What RegMean, GPTQ, SparseGPT and RSQ solve with, and (the diagonal) what Wanda ranks by. Their own factors (a
Hessian is 2 X^T X per sequence) change no result of theirs. B examples, S tokens, N rows, D width of the input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.methods.statistics.base import Statistic
from fulgurite.methods.structure import sites

ROWS_AT_ONCE = 4096
DIVIDED_AT_ONCE = 128  # rows of a sum

PerLayer = Tensor | Mapping[str, Tensor] | None  # a mapping may leave layers out


@torch.no_grad()
def gram_of(rows: Tensor, weights: Tensor | None, dtype: torch.dtype, diagonal: bool = False) -> Tensor:
    """sum_t w_t x_t x_t^T of rows (N, D) in ``dtype``: (D, D), or its diagonal (D,); see `add_gram`."""
    width = rows.shape[-1]
    out = torch.zeros((width,) if diagonal else (width, width), dtype=dtype, device=rows.device)
    return add_gram(out, rows, weights)


@torch.no_grad()
def add_gram(out: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Add sum_t w_t x_t x_t^T of rows (N, D) to ``out`` (D, D), or its diagonal to ``out`` (D,), in the type of that.

    TF32 is off, and autocast leaves products in place alone. Holds a copy of 4096 rows in the type of ``out``.
    """
    with full_precision():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            x = rows[start : start + ROWS_AT_ONCE].to(out.dtype)
            weighted = x if weights is None else x * weights[start : start + ROWS_AT_ONCE, None].to(out.dtype)
            if out.dim() == 1:
                out += (weighted * x).sum(0)
            else:
                out.addmm_(weighted.T, x)
    return out


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32 while inside, whatever the precision that was asked for outside."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer switch, which then reads tf32
        before = None
    newer = torch.backends.cuda.matmul.fp32_precision
    if before is None:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before is None:
            torch.backends.cuda.matmul.fp32_precision = newer
        else:
            torch.set_float32_matmul_precision(before)


def version_of(tensor: Tensor) -> int:
    """How often it was written into; 0 where that is not counted, in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def token_shares(importance: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights of tokens that sum to the number of real tokens in every example, as RSQ takes them (arXiv 2503.01820).

    Args:
        importance: (B, S), not negative.
        mask: (B, S), nonzero for real tokens; all when not given.

    Returns:
        (B, S); 1 for the real tokens of an example whose importance is 0 throughout.
    """
    real = torch.ones_like(importance) if mask is None else (mask != 0).to(importance.dtype)
    kept = importance * real
    total = kept.sum(1, keepdim=True)
    return torch.where(total > 0, kept * real.sum(1, keepdim=True) / total.where(total > 0, 1), real)


def input_width(module: nn.Module) -> tuple[int, bool]:
    """Width of a linear layer's input, and whether its weight is stored as (in, out).

    Raises:
        ValueError: it is no linear layer.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        if isinstance(module, nn.Linear):
            return weight.shape[1], False
        if type(module).__name__ == "Conv1D":  # the layer of GPT-2, whose library cannot be imported here
            return weight.shape[0], True
    raise ValueError(f"{type(module).__name__} is no linear layer: only nn.Linear and Conv1D have a Gram matrix here")


class GramStatistics(Statistic):
    """Second moments of the inputs of named linear layers, taken while the model runs.

        grams = GramStatistics(model, r"blocks\\.\\d+\\.fc1", expected=12)
        for batch in data:
            with grams.watch(mask=batch["attention_mask"]):
                model(batch)
        grams.means()["blocks.0.fc1"]

    Memory: one (D, D) matrix (or (D,) where ``diagonal``) per distinct input in the type of the sums, 8 D^2 bytes on
    the CPU and 4 D^2 elsewhere, and a copy of 4096 rows; where inputs lie on another device than the sums, one
    more matrix while it is updated.

    Args:
        model: holds the layers. It is not changed, and hooked only inside `watch`.
        pattern: full pattern of the layers' names.
        expected: how many layers it must match.
        shared: groups of patterns whose i-th matches receive the same input, as in `ModelSpec.shared_inputs`; those
            that ``pattern`` matches have one Gram. That the inputs are equal is checked.
        diagonal: only the column energies, the diagonal.
        dtype: of the sums; float64 on the CPU and float32 elsewhere by default.
        device: of the sums; that of each layer's weight by default.
        tables: names of layers of whose inputs in a batch every second one is no input of tokens, and left out; see
            `ModelSpec.position_readers`.

    Attributes:
        transposed: names of the layers whose weight is stored as (in, out).
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str,
        expected: int,
        shared: Sequence[Sequence[str]] = (),
        diagonal: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tables: Collection[str] = (),
    ) -> None:
        super().__init__(dtype)
        self.diagonal, self.tables = diagonal, frozenset(tables)
        names = sites(model, pattern, expected)
        self.modules = {name: model.get_submodule(name) for name in names}
        self.owner = owners(model, names, shared)
        widths = {}
        for name, module in self.modules.items():
            try:
                widths[name] = input_width(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; narrow the pattern {pattern!r}") from None
        self.transposed = frozenset(name for name, (_, turned) in widths.items() if turned)
        self.widths = {name: width for name, (width, _) in widths.items()}
        for name, owner in self.owner.items():
            if self.widths[name] != self.widths[owner]:
                raise ValueError(f"{owner} and {name} share no input: widths {self.widths[owner]}, {self.widths[name]}")
        for name in dict.fromkeys(self.owner.values()):
            place = self.modules[name].weight.device if device is None else torch.device(device)
            self.make(name, (self.widths[name],) * (1 if diagonal else 2), place)
            self.make_count(name, place)

    @property
    def settings(self) -> dict[str, Any]:
        """Whether only diagonals were taken."""
        return {"diagonal": self.diagonal}

    @contextmanager
    def watch(self, mask: PerLayer = None, weights: PerLayer = None) -> Iterator[None]:
        """Take the inputs of all layers while inside; one batch at a time, since mask and weights are a batch's.

        Args:
            mask: (B, S), nonzero for real tokens, or one per layer name where they differ. A layer with an input of
                (B, D) takes the examples that have a real token.
            weights: (B, S) weights of the tokens, not negative, or one per layer name; see `token_shares`.

        Raises:
            ValueError: a mask or weight does not fit an input, or layers said to share an input do not.
        """
        self.check_open()
        sharing: dict[str, set[str]] = {}
        for name, owner in self.owner.items():
            sharing.setdefault(owner, set()).add(name)
        latest: dict[str, tuple[Tensor, int, set[str]]] = {}  # inputs that not all that share them have shown yet
        calls: Counter[str] = Counter()

        def take(name: str, x: Tensor) -> None:
            calls[name] += 1
            if name in self.tables and calls[name] % 2 == 0:
                return
            owner = self.owner[name]
            if owner in latest and name in latest[owner][2]:
                known, version, waiting = latest[owner]
                if version_of(known) != version or (x is not known and not torch.equal(x, known)):
                    raise ValueError(f"{name} and {owner} share no input: their values differ; mend shared")
                waiting.discard(name)
            else:
                self.update(name, x, for_layer(mask, name), for_layer(weights, name))
                latest[owner] = (x, version_of(x), sharing[owner] - {name})
            if not latest[owner][2]:
                del latest[owner]

        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: take(name, args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            )
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def update(self, name: str, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add one input (..., D) of the layer ``name``; with layers that share it, once for all of them.

        Raises:
            ValueError: the width, mask or weights do not fit, or a weight is negative.
        """
        self.check_open()
        owner = self.owner[name]
        if x.shape[-1] != self.widths[name]:
            raise ValueError(f"{name}: an input of width {x.shape[-1]}, expected {self.widths[name]}")
        rows = x.detach().reshape(-1, x.shape[-1])
        kept = None if mask is None else fitted(name, "mask", mask, x) != 0
        if weights is not None:
            weights = fitted(name, "weights", weights, x)
            if (weights < 0).any():
                raise ValueError(f"{name}: negative token weights")
            # Rows without weight are left out, not multiplied: they may hold anything, NaN included.
            kept = weights != 0 if kept is None else kept & (weights != 0)
        if kept is not None:
            rows = rows[kept]
            weights = None if weights is None else weights[kept]
        own, dtype = self.sums[owner], self.sum_dtype(x.device)
        if (own.device, own.dtype) == (rows.device, dtype):
            add_gram(own, rows, weights)
        else:
            own.add_(gram_of(rows, weights, dtype, self.diagonal).to(own.device, own.dtype))
        self.counts[owner] += len(rows) if weights is None else weights.double().sum().to(own.device)

    @property
    def unseen(self) -> list[str]:
        """Layers that have seen no row: they were not called as modules, or all was masked."""
        return [name for name, owner in self.owner.items() if not self.counts[owner] > 0]

    def means(self, leave_out: Collection[str] = (), dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Layer name -> G (D, D), or its diagonal (D,) where ``diagonal``; layers that share an input share a tensor.

        Args:
            leave_out: layers that are not wanted.
            dtype: of the means; that of the sums by default. No copy in another type is held meanwhile.

        Raises:
            ValueError: another layer has seen no row. Names all.
        """
        empty = [name for name in self.unseen if name not in leave_out]
        if empty:
            raise ValueError(f"no input was seen by {empty}: they were not called as modules, or all was masked")
        owner = {name: owner for name, owner in self.owner.items() if name not in leave_out}
        shared = {}
        for name in set(owner.values()):
            total = self.sums[name]
            shared[name] = torch.empty_like(total, dtype=dtype or total.dtype)
            for mean, part in zip(shared[name].split(DIVIDED_AT_ONCE), total.split(DIVIDED_AT_ONCE)):
                mean.copy_(part / self.counts[name].to(total.dtype))
        return {name: shared[owner] for name, owner in owner.items()}

    def energies(self) -> dict[str, Tensor]:
        """Layer name -> mean square (D,) of every column of its input."""
        means = self.means()
        return means if self.diagonal else {name: gram.diagonal().clone() for name, gram in means.items()}


def for_layer(given: PerLayer, name: str) -> Tensor | None:
    """What is given for one layer; a mapping may leave layers out."""
    return given.get(name) if isinstance(given, Mapping) else given


def fitted(name: str, what: str, given: Tensor, x: Tensor) -> Tensor:
    """``given`` (B, S) as one number per row of ``x`` (..., D).

    Raises:
        ValueError: it has another number of rows.
    """
    given = given.to(x.device)
    rows, same = x.shape[:-1], given.numel() * x.shape[-1] == x.numel()
    # Rows in the order of (B, S): as they are, flat, or S in several dimensions, but not turned round to (S, B).
    if same and (given.shape == rows or len(rows) == 1 or (len(rows) > 2 and given.shape[:1] == rows[:1])):
        return given.reshape(-1)
    if what == "mask" and x.shape[:-1] == given.shape[:1]:
        return (given != 0).flatten(1).any(1)
    raise ValueError(
        f"{name}: a {what} of {tuple(given.shape)} does not fit an input of {tuple(x.shape)}; "
        f"give {what} per layer name, without the layers that it does not concern"
    )


def owners(model: nn.Module, names: Sequence[str], shared: Sequence[Sequence[str]]) -> dict[str, str]:
    """Name -> the first of ``names`` that receives the same input.

    Raises:
        LookupError: the patterns of a group match different numbers of modules.
    """
    owner = {name: name for name in names}
    everything = [name for name, _ in model.named_modules()]
    for group in shared:
        matches = [[name for name in everything if re.fullmatch(pattern, name)] for pattern in group]
        if len({len(found) for found in matches}) > 1:
            counts = ", ".join(f"{pattern!r}: {len(found)}" for pattern, found in zip(group, matches))
            raise LookupError(f"patterns of modules that share inputs match different numbers of them: {counts}")
        for together in zip(*matches):
            chosen = [name for name in together if name in owner]
            owner.update(dict.fromkeys(chosen, chosen[0] if chosen else ""))
    return owner
