"""Attacks that first change the edited model, and then run another attack on it.

Relearning fine-tunes on a few other answers (arXiv 2505.01456); quantisation rounds the edited weight (arXiv
2410.16454): both are known to bring back what was only hidden.
"""

from __future__ import annotations

from typing import Literal

from fulgurite.methods.unlearning.attacks.base import Attack


class Wrapped(Attack):
    """Another attack on a changed model.

    Args:
        then: the attack.
    """

    def __init__(self, then: Attack) -> None:
        if isinstance(then, Wrapped):
            raise ValueError(
                f"{type(self).__name__}: then={type(then).__name__} changes the model again; name an attack"
            )
        self.then = then

    @property
    def budget(self) -> int:
        """That of the other attack."""
        return self.then.budget

    @property
    def title(self) -> str:
        """Both names."""
        return f"{self.name}, {self.then.title}"


class Relearning(Wrapped):
    """Fine-tune the edited weight, by low-rank factors of its own, on questions and answers that are not the deleted
    one; then attack.

    Args:
        then: the attack.
        source: ``"neighbours"`` are the item's questions about the same picture, ``"retain"`` others of the data.
        pairs: questions per item.
        steps: of AdamW at a constant rate.
        lr: its learning rate.
        rank: of the factors.
        alpha: their scale is alpha / rank.
    """

    name = "relearning"

    def __init__(
        self,
        then: Attack,
        source: Literal["neighbours", "retain"] = "retain",
        pairs: int = 1,
        steps: int = 10,
        lr: float = 9e-6,
        rank: int = 2,
        alpha: float = 6.0,
    ) -> None:
        super().__init__(then)
        if min(pairs, steps, rank) < 1 or not lr > 0:
            raise ValueError(
                f"Relearning: pairs={pairs}, steps={steps} and rank={rank} must be at least 1, and lr={lr} above 0"
            )
        self.source, self.pairs, self.steps, self.lr, self.rank, self.alpha = source, pairs, steps, lr, rank, alpha


class Quantized(Wrapped):
    """Round the edited weight to few bits (to nearest, per group of inputs); then attack.

    Args:
        then: the attack.
        bits: 2 to 8.
        group_size: inputs that share a scale; None takes a whole row.
    """

    name = "quantized"

    def __init__(self, then: Attack, bits: int = 4, group_size: int | None = None) -> None:
        super().__init__(then)
        if not 2 <= bits <= 8:
            raise ValueError(f"Quantized: bits={bits} must be between 2 and 8")
        self.bits, self.group_size = bits, group_size

    @property
    def title(self) -> str:
        """With its bits."""
        return f"{self.bits} bits, {self.then.title}"
