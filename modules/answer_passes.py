"""What an unlearning module asks of its backbone: probabilities of answers, states of layers, texts that it writes.

Rows are questions, each about one picture and in the state of one item. A pass over more rows than ``rows_per_pass`` is
cut; pictures are encoded once per batch.

Legend: R rows, T answer tokens, S layers, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from fulgurite.backbones.decoding import answer_ids, decoder_blocks, lens_parts, sampled_ids, with_features
from fulgurite.backbones.generation import GenerativeBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.unlearning.edits.base import answers_behind
from fulgurite.methods.unlearning.lens import LogitLens, layer_states
from fulgurite.methods.unlearning.memorisation import exact_memorisation, min_k, probability, token_log_probabilities
from fulgurite.methods.unlearning.objectives.base import View, answer_nll
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.edited_state import EditedState
from fulgurite.samples import Batch, Sample

READ = ("text", "text_mask", "features", "picture")


class AnswerPasses(AdaptedModule):
    """Passes over rows of questions; see `AdaptedModule` for further arguments.

    Args:
        backbone: a language model that reads pictures.
        adapters: what trains beside it.
        answer_tokens: most tokens of an answer that is written.
        rows_per_pass: most rows of a pass.

    Attributes:
        pool: all samples of the data.
    """

    backbone: GenerativeBackbone
    pool: Sequence[Sample]

    def __init__(
        self,
        backbone: GenerativeBackbone,
        adapters: list[Placement],
        answer_tokens: int,
        rows_per_pass: int,
        **options: Any,
    ) -> None:
        super().__init__(backbone, adapters, **options)
        self.answer_tokens, self.rows_per_pass = answer_tokens, rows_per_pass

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the language model."""
        return decoder_blocks(self.backbone)

    @property
    def reader(self) -> LogitLens:
        """Its logit lens."""
        return LogitLens(*lens_parts(self.backbone), len(self.blocks))

    def configure_model(self) -> None:
        """As in the base; what is called by itself gathers its slices too."""
        was_sharded = isinstance(self, FSDPModule)
        super().configure_model()
        if isinstance(self, FSDPModule) and not was_sharded:
            for name in ("view", "lens_at", "write_ids", "draw_ids", "encoded"):
                register_fsdp_forward_method(self, name)
            for part in self.backbone.modules():
                if hasattr(part, "generate"):
                    part._is_fsdp_managed_module = True  # by which transformers lets no process stop before the others

    def forward(self, batch: Batch, labels: Tensor) -> Tensor:
        """Logits (R, T, V) of each answer token from the true ones before it."""
        return self.backbone(batch, labels)

    def view(
        self,
        batch: Batch,
        labels: Tensor,
        layers: Sequence[int] = (),
        state_layer: int | None = None,
        needs_logits: bool = True,
    ) -> View:
        """One pass over R rows with the answers ``labels`` (R, T); it ends where nothing more is read."""
        wanted = sorted({*layers, *(() if state_layer is None else (state_layer + 1,))})
        length = labels.shape[1]
        with answers_behind(length - 1):
            if not wanted:
                return View(self.backbone(batch, labels), labels)
            stop = not needs_logits and not isinstance(self, FSDPModule)
            found, logits = layer_states(
                self.blocks, wanted, slice(-length, None), lambda: self.backbone(batch, labels), stop
            )
        lens = None
        if layers:
            lens = self.reader.log_probabilities({layer: found[layer][:, 0] for layer in layers}).transpose(0, 1)
        states = None if state_layer is None else found[state_layer + 1]
        return View(logits if needs_logits else None, labels, lens, states)

    def lens(self, batch: Batch, layers: Sequence[int]) -> dict[int, Tensor]:
        """(R, V) float32 probabilities by layer at the last position of each row's prompt."""
        after = torch.zeros(len(batch["text"]), 1, dtype=torch.long, device=self.device)
        return self.lens_at(batch, after, layers)

    def lens_at(self, batch: Batch, labels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The same at the position that predicts the last of ``labels`` (R, T)."""
        stop = not isinstance(self, FSDPModule)
        found, _ = layer_states(self.blocks, list(layers), slice(-1, None), lambda: self.backbone(batch, labels), stop)
        return self.reader.probabilities({layer: found[layer][:, 0] for layer in layers})

    def lens_after(
        self, batch: Batch, ids: Tensor, layers: Sequence[int], state: EditedState, items: Tensor
    ) -> dict[int, Tensor]:
        """The same behind answers that begin with ``ids`` (R, t)."""
        labels = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)
        with state.over(items):
            return self.lens_at(batch, labels, layers)

    def write_ids(self, batch: Batch) -> Tensor:
        """Token ids (R, T) of the likeliest answers."""
        return self.backbone.generate_ids(batch, 1, self.answer_tokens)

    def draw_ids(self, batch: Batch, seeds: Sequence[int], temperature: float, max_new_tokens: int) -> Tensor:
        """Token ids (R, T) of sampled answers, each by its own stream."""
        return sampled_ids(self.backbone, batch, seeds, temperature, max_new_tokens)

    def encoded(self, samples: Sequence[Sample]) -> Batch:
        """R questions as a batch on the device, with their pictures encoded; one that is asked often is read once."""
        keys = [(sample.question, id(sample.features if sample.image is None else sample.image)) for sample in samples]
        asked = dict(zip(reversed(keys), reversed(samples)))
        places = {key: place for place, key in enumerate(asked)}
        rows = torch.tensor([places[key] for key in keys], device=self.device)
        return self.rows_of(self._encoded(list(asked.values())), rows)

    def _encoded(self, samples: Sequence[Sample]) -> Batch:
        collated = self.backbone.collator("test")(samples)
        batch = {name: value.to(self.device) for name, value in collated.items() if isinstance(value, Tensor)}
        return {name: value for name, value in with_features(self.backbone, batch).items() if name in READ}

    def rows_of(self, batch: Batch, rows: Tensor) -> Batch:
        """Some rows of a batch."""
        return {name: value[rows] for name, value in batch.items()}

    def labels_of(self, texts: Sequence[str]) -> Tensor:
        """(R, T) ids of answers. Raises DataError for one without tokens."""
        return answer_ids(self.backbone, list(texts)).to(self.device)

    def _passes(
        self,
        rows: Sequence[Sample],
        items: Tensor,
        given: Sequence[Any],
        spare: Any,
        run: Callable[[Batch, Tensor, Sequence[Any]], Any],
    ) -> list[Any]:
        """What ``run(batch, items, given)`` says of each part of R rows.

        Slices of weights are gathered by all processes at once, so that one with fewer rows passes a spare one.
        """
        parts = [slice(start, start + self.rows_per_pass) for start in range(0, len(rows), self.rows_per_pass)]
        more = 0
        if isinstance(self, FSDPModule):
            number = torch.tensor(float(len(parts)), device=self.device)
            more = int(self.trainer.strategy.reduce(number, reduce_op="max")) - len(parts)
        found = [run(self.encoded(rows[part]), items[part], given[part]) for part in parts]
        for _ in range(more):
            run(self.encoded(self.pool[:1]), torch.zeros(1, dtype=torch.long, device=self.device), [spare])
        return found

    def _texts(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def written(self, rows: Sequence[Sample], items: Tensor, state: EditedState) -> list[str]:
        """The likeliest answers to R questions."""

        def run(batch: Batch, own: Tensor, given: Any) -> list[str]:
            with state.over(own):
                return self._texts(self.write_ids(batch))

        return [*chain.from_iterable(self._passes(rows, items, rows, None, run))]

    @torch.no_grad()
    def drawn(
        self,
        rows: Sequence[Sample],
        items: Tensor,
        state: EditedState,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
    ) -> list[str]:
        """Sampled answers to R questions."""

        def run(batch: Batch, own: Tensor, seeds: Sequence[int]) -> list[str]:
            with state.over(own):
                return self._texts(self.draw_ids(batch, seeds, temperature, max_new_tokens))

        return [*chain.from_iterable(self._passes(rows, items, seeds, 0, run))]

    @torch.no_grad()
    def scored(
        self, rows: Sequence[Sample], texts: Sequence[str], items: Tensor, state: EditedState
    ) -> dict[str, Tensor]:
        """(R,) by name: ``log_probability`` of whole answers, the sum over their tokens; per token ``probability``,
        ``exact_memorisation`` and ``min_k``, see `methods.unlearning.memorisation`."""

        def run(batch: Batch, own: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
            labels = self.labels_of(texts)
            with state.over(own):
                view = self.view(batch, labels)
            nll = answer_nll(view)
            return {
                "log_probability": -nll,
                "probability": probability(nll, view.lengths),
                "exact_memorisation": exact_memorisation(view.logits, labels),
                "min_k": min_k(token_log_probabilities(view.logits, labels), labels),
            }

        parts = self._passes(rows, items, texts, "yes", run)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
