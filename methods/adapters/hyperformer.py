"""Hyperformer (Karimi Mahabadi et al., 2021, arXiv 2106.04489) as VL-Adapter uses it: adapters made by hyper-networks.

With embeddings t of the task and l of the layer, a stack of blocks has

    z = LN(P2 relu(P1 [t; l]))                      (p,)
    D = reshape(G_D z + c_D), d = G_d z + c_d       (b, D), (b,)      and U, u alike
    y' = y + U act(D y + d) + u

with generators G for each kind of site (after self-attention, cross-attention, feed-forward). With one network for all
kinds, an embedding k of the kind joins [t; l; k], and the generators are the same.

Legend: D width, b inner width, T width of the embeddings, H hidden width of P1, p width of z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Spanning, SpanSite, site_width
from fulgurite.methods.adapters.down_up import Activation, Init, activation_of, inner_width
from fulgurite.methods.adapters.kept import Kept
from fulgurite.methods.adapters.mixing import Mixture
from fulgurite.methods.adapters.tasks import grouped_by_task, select_sets


class Weights(NamedTuple):
    """The adapter of one task at one site: (b, D), (b,), (D, b), (D,)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


class Generators(nn.Module):
    """z (p,) -> `Weights`. Parameters: (p + 1) (2 D b + D + b)."""

    def __init__(self, projected: int, width: int, inner: int) -> None:
        super().__init__()
        self.width, self.inner = width, inner
        self.down = nn.Linear(projected, inner * width)
        self.down_bias = nn.Linear(projected, inner)
        self.up = nn.Linear(projected, width * inner)
        self.up_bias = nn.Linear(projected, width)

    def forward(self, z: Tensor) -> Weights:
        """One adapter's tensors."""
        down, up = self.down(z).view(self.inner, self.width), self.up(z).view(self.width, self.inner)
        return Weights(down, self.down_bias(z), up, self.up_bias(z))


class HyperNetwork(nn.Module):
    """That of one stack of blocks.

    Parameters: H (2 T + 1) + p (H + 1) + 2 p + T per layer, and the `Generators` of each kind of site; with one
    network for K kinds H T + K T more, and the generators once.
    """

    def __init__(
        self,
        kinds: Mapping[str, int],
        layers: int,
        embedding: int,
        hidden: int,
        projected: int,
        reduction: int,
        one: bool,
    ) -> None:
        super().__init__()
        self.kinds, self.one = list(kinds), one
        self.layers = nn.Parameter(torch.empty(layers, embedding))
        self.kind_embeddings = nn.Parameter(torch.empty(len(kinds), embedding)) if one else None
        self.first = nn.Linear((3 if one else 2) * embedding, hidden)
        self.second = nn.Linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)
        widths = list(kinds.values())[:1] if one else kinds.values()
        self.generators = nn.ModuleList(Generators(projected, w, inner_width(w, reduction)) for w in widths)

    def made_of(self, kind: int) -> list[Tensor]:
        """The parameters that a kind's weights come from."""
        linears = [self.first, self.second, self.norm, *self.generators[0 if self.one else kind].children()]
        tables = [self.layers] if self.kind_embeddings is None else [self.layers, self.kind_embeddings]
        return [*tables, *(p for linear in linears for p in (linear.weight, linear.bias))]

    def forward(self, task: Tensor, layer: int, kind: int) -> Weights:
        """The adapter of a task, by its embedding (T,), at one site."""
        embeddings = [task, self.layers[layer]]
        if self.kind_embeddings is not None:
            embeddings.append(self.kind_embeddings[kind])
        z = self.norm(self.second(F.relu(self.first(torch.cat(embeddings)))))
        return self.generators[0 if self.one else kind](z)


class Hyperformer(Spanning):
    """Bottleneck adapters of all sites, made from embeddings of task and layer.

    Every stack of blocks (encoder, decoder) has its own `HyperNetwork`; the task embeddings, T for each task, are
    shared. Sites are told apart by their module's name, whose first number is the layer and what stands before it the
    stack, and by their point, which is their kind. A site makes its task's weights when it is called: once per task,
    layer and step. In evaluation they are kept while the parameters stay: 2 D b floats per task and site.

    Sets are chosen per sample, not mixed: an average of hyper-networks makes no average of adapters.

    Args:
        sites: outputs of sublayers, at one point for each kind.
        tasks: their names, in the order that `tasks_of` counts through.
        reduction: the inner width is the site's width divided by it.
        embedding: T.
        hidden: H.
        projected: p.
        one_network: one set of generators for all kinds of a stack, with embeddings of the kinds.
        activation: the non-linearity of the adapters.
        init: ``"zero_up"`` starts the generators of U and u with zeros, the identity; ``"official"`` draws them, too.

    Raises:
        ValueError: no task, a site whose name has no number, two sites of one layer and kind, or widths that differ
            where one generator serves them.
    """

    verb = "transform"

    def __init__(
        self,
        sites: Sequence[SpanSite],
        tasks: list[str],
        reduction: int = 8,
        embedding: int = 512,
        hidden: int = 128,
        projected: int = 64,
        one_network: bool = False,
        activation: Activation = "gelu_new",
        init: Init = "zero_up",
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks={tasks} must name at least one task, and none twice")
        self.tasks, self.init, self.activation = tuple(tasks), init, activation_of(activation)
        # One tensor each: a step of other tasks leaves a task's where it is, as published.
        self.task_embeddings = nn.ParameterList(torch.empty(embedding) for _ in tasks)
        self.networks = nn.ModuleList()
        self._where: list[tuple[int, int, int]] = [(0, 0, 0)] * len(sites)
        for number, stack in enumerate(_stacks(sites)):
            layers = sorted({layer for layer, _, _ in stack})
            kinds: dict[str, int] = {}
            for layer, index, site in stack:
                width = site_width(site.module)
                expected = next(iter(kinds.values()), width) if one_network else kinds.setdefault(site.point, width)
                if width != expected:
                    raise ValueError(f"{site.name!r} has width {width}, and its generators are made for {expected}")
                kinds.setdefault(site.point, width)
                self._where[index] = (number, layers.index(layer), list(kinds).index(site.point))
            self.networks.append(HyperNetwork(kinds, len(layers), embedding, hidden, projected, reduction, one_network))
        self._kept = Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Task embeddings ~ N(0, 1); linears and tables ~ N(0, 0.02), biases 0; U and u zero for ``zero_up``."""
        for embedding in self.task_embeddings:
            embedding.normal_(generator=generator)
        for network in self.networks:
            for table in (network.layers, network.kind_embeddings):
                if table is not None:
                    table.normal_(std=0.02, generator=generator)
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=0.02, generator=generator)
                    module.bias.zero_()
            network.norm.reset_parameters()
            for generators in network.generators if self.init == "zero_up" else ():
                generators.up.weight.zero_()
                generators.up_bias.weight.zero_()

    def of_tasks(self) -> list[list[nn.Parameter]]:
        """The embeddings."""
        return [[embedding] for embedding in self.task_embeddings]

    def weights(self, index: int, task: int) -> Weights:
        """The adapter of a task at the site ``index``; it depends on nothing else."""
        stack, layer, kind = self._where[index]
        network = self.networks[stack]

        def make() -> Weights:
            return network(self.task_embeddings[task], layer, kind)

        if self.training or torch.is_grad_enabled():
            return make()
        return self._kept.get((index, task), [self.task_embeddings[task], *network.made_of(kind)], make)

    def at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """``y`` (B, ..., D) -> (B, ..., D), every sample by its task's adapter."""
        tasks = grouped_by_task(self.tasks, y)
        if len(tasks.groups) == 1:
            return self._adapted(index, tasks.groups[0].experts[0], y)
        parts = [self._adapted(index, group.experts[0], y[group.rows]) for group in tasks.groups]
        return tasks.gather(parts, len(y))

    def _adapted(self, index: int, task: int, y: Tensor) -> Tensor:
        weights = self.weights(index, task)
        hidden = self.activation(F.linear(y, weights.down, weights.down_bias))
        return y + F.linear(hidden, weights.up, weights.up_bias)

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, index: int, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        """Every sample's set, and of that its task's adapter."""
        return select_sets(experts[0].tasks, mixture, y, lambda i, rows: experts[i](index, args, kwargs, y[rows]))


def _stacks(sites: Sequence[SpanSite]) -> list[list[tuple[int, int, SpanSite]]]:
    """The stacks' sites as (layer, index, site)."""
    stacks: dict[str, list[tuple[int, int, SpanSite]]] = {}
    seen: dict[tuple[str, int, str], str] = {}
    for index, site in enumerate(sites):
        parts = site.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            raise ValueError(f"Hyperformer needs the layer of each site: the name {site.name!r} has no number")
        stack, layer = ".".join(parts[:number]), int(parts[number])
        other = seen.setdefault((stack, layer, site.point), site.name)
        if other != site.name:
            raise ValueError(
                f"{other!r} and {site.name!r} are both at {site.point!r} of layer {layer}; it has one site of a kind"
            )
        stacks.setdefault(stack, []).append((layer, index, site))
    return list(stacks.values())
