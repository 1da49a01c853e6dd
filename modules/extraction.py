"""Attacks on n items at once: what each finds, and whether the deleted answer is among it.

All white-box attacks read one pass over the n prompts; sampled answers have a random stream per row, so that an item's
candidates do not depend on which others are attacked with it.

Legend: n items, R rows, B candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.random import digest_of
from fulgurite.methods.unlearning.answers import share_that_say
from fulgurite.methods.unlearning.attacks.base import Attack, BlackBox, Target, WhiteBox
from fulgurite.methods.unlearning.attacks.whole_answer import WholeAnswer
from fulgurite.methods.unlearning.attacks.wrapped import Quantized, Relearning
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.modules.edited_state import EditedState, item_rows
from fulgurite.modules.item_questions import answer_of
from fulgurite.samples import Batch, DataError, Sample


def attacked(
    module: Any, attacks: Mapping[str, Attack], samples: Sequence[Sample], state: EditedState
) -> dict[str, list[float]]:
    """By name the share of candidates that are the answer, of n items; an attack succeeds above 0.

    Args:
        module: `MultimodalUnlearning`.
        attacks: by name.
        samples: n items.
        state: weights that are attacked.
    """
    white = {name: attack for name, attack in attacks.items() if isinstance(attack, WhiteBox)}
    found = read_out(module, white, samples, state) if white else {}
    for name, attack in attacks.items():
        if isinstance(attack, BlackBox):
            found[name] = asked(module, attack, samples, state)
        elif isinstance(attack, Quantized):
            found[name] = rounded(module, attack, samples, state)
        elif isinstance(attack, Relearning):
            found[name] = relearned(module, attack, samples, state)
    return {name: found[name] for name in attacks}


@torch.no_grad()
def read_out(
    module: Any, attacks: Mapping[str, WhiteBox], samples: Sequence[Sample], state: EditedState
) -> dict[str, list[float]]:
    """White-box attacks: one pass, one reading of the output matrix for all of them."""
    batch = module.encoded(samples)
    items = item_rows([1] * len(samples), module.device)
    layers = sorted({layer for attack in attacks.values() for layer in attack.layers})
    with state.over(items):
        lens = module.lens(batch, layers)
    answers = [answer_of(sample) for sample in samples]
    first = module.labels_of(answers)[:, 0]
    found = {}
    for name, attack in attacks.items():
        if isinstance(attack, WholeAnswer):
            texts = spelled(module, attack, batch, state, lens)
            found[name] = judged(texts, answers)
        else:
            found[name] = torch.eq(attack.candidates(lens), first[:, None]).double().mean(1).tolist()
    return found


def spelled(
    module: Any, attack: WholeAnswer, batch: Batch, state: EditedState, lens: dict[int, Tensor]
) -> list[list[str]]:
    """The candidate texts of every item."""

    def follow(rows: Tensor, ids: Tensor) -> dict[int, Tensor]:
        parts = [
            module.lens_after(module.rows_of(batch, rows[part]), ids[part], attack.layers, state, rows[part])
            for part in torch.arange(len(rows), device=rows.device).split(module.rows_per_pass)
        ]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in attack.layers}

    ids = attack.search(lens, follow, module.backbone.end)
    texts = module.backbone.tokenizer.batch_decode(ids.flatten(0, 1), skip_special_tokens=True)
    return [texts[start : start + attack.budget] for start in range(0, len(texts), attack.budget)]


@torch.no_grad()
def asked(module: Any, attack: BlackBox, samples: Sequence[Sample], state: EditedState) -> list[float]:
    """Black-box attacks: answers drawn to the attack's queries."""
    rows, seeds = [], []
    for sample in samples:
        for number, query in enumerate(queries_of(attack, sample)):
            picture = sample.image if query.level == "original" else pictures(sample, query.level)[query.place]
            for draw in range(attack.samples):
                rows.append(module.question(sample, query.question, picture))
                seeds.append(digest_of(module.attack_seed, attack.title, draw, f"{sample.domain} {sample.id} {number}"))
    items = item_rows([attack.budget] * len(samples), module.device)
    texts = module.drawn(rows, items, state, seeds, attack.temperature, attack.max_new_tokens)
    each = [texts[start : start + attack.budget] for start in range(0, len(texts), attack.budget)]
    return judged(each, [answer_of(sample) for sample in samples])


def rounded(module: Any, attack: Quantized, samples: Sequence[Sample], state: EditedState) -> list[float]:
    """The inner attack on each item's rounded weight; all at once where they share one."""
    then = {attack.title: attack.then}
    if state.shared:
        return attacked(module, then, samples, state.quantized(0, attack))[attack.title]
    outcomes = []
    for item, sample in enumerate(samples):
        outcomes += attacked(module, then, [sample], state.quantized(item, attack))[attack.title]
    return outcomes


def relearned(module: Any, attack: Relearning, samples: Sequence[Sample], state: EditedState) -> list[float]:
    """The inner attack on weights that each item's relearning has changed."""
    edit = LowRankEdit(state.site, len(samples), attack.rank, attack.alpha, dropout=0.0).to(module.device)
    module.relearn(edit, attack, samples, state)
    return attacked(module, {attack.title: attack.then}, samples, state.with_edit(edit))[attack.title]


def judged(texts: Sequence[Sequence[str]], answers: Sequence[str]) -> list[float]:
    """Shares of candidates that hold the answer to the letter."""
    return [share_that_say(candidates, answer) for candidates, answer in zip(texts, answers, strict=True)]


def pictures(sample: Sample, level: str) -> Sequence[Any]:
    """The rephrased pictures of a level."""
    return sample.fact.rephrased_images.get(level, ())


def queries_of(attack: BlackBox, sample: Sample) -> list[Any]:
    """The attack's queries. Raises DataError naming the item where it lacks what they need."""
    target = Target(
        sample.question,
        sample.fact.rephrased_questions,
        sample.fact.subject,
        {level: len(found) for level, found in sample.fact.rephrased_images.items()},
    )
    try:
        return attack.queries(target)
    except ValueError as error:
        raise DataError(f"item {sample.id!r} of {sample.domain} {error} in model.init_args.attacks") from error
