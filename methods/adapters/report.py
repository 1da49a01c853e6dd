"""How much a bank of adapters trains and stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlacementReport:
    """One placement's part of a set: the adapters' kind, where they are, and their size."""

    kind: str
    points: tuple[str, ...]
    num_sites: int
    num_parameters: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.num_sites} site{'' if self.num_sites == 1 else 's'} ({', '.join(self.points)})"


@dataclass(frozen=True)
class BankReport:
    """Size of one set of adapters beside its backbone; prints as one line.

    The model is the backbone with one set: the frozen copies that a bank keeps as further sets do not count.
    """

    placements: tuple[PlacementReport, ...]
    num_backbone_parameters: int

    @property
    def num_parameters(self) -> int:
        """Trained parameters: those of one set."""
        return sum(row.num_parameters for row in self.placements)

    @property
    def num_model_parameters(self) -> int:
        """Parameters of the backbone and one set."""
        return self.num_backbone_parameters + self.num_parameters

    @property
    def num_bytes(self) -> int:
        """Bytes of one set."""
        return sum(row.num_bytes for row in self.placements)

    @property
    def share(self) -> float:
        """Trained parameters as a part of the model's."""
        return self.num_parameters / max(self.num_model_parameters, 1)

    def __str__(self) -> str:
        places = ", ".join(map(str, self.placements))
        return (
            f"{self.num_parameters:,} of {self.num_model_parameters:,} parameters train ({self.share:.2%}, "
            f"{self.num_bytes / 1e6:.2f} MB): {places}"
        )
