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


@dataclass(frozen=True)
class BankReport:
    """Size of one set of adapters beside its backbone; prints as a table."""

    placements: tuple[PlacementReport, ...]
    num_backbone_parameters: int

    @property
    def num_parameters(self) -> int:
        """Trained parameters of one set."""
        return sum(row.num_parameters for row in self.placements)

    @property
    def num_bytes(self) -> int:
        """Bytes of one set."""
        return sum(row.num_bytes for row in self.placements)

    @property
    def share(self) -> float:
        """Trained parameters as a part of the backbone's."""
        return self.num_parameters / max(self.num_backbone_parameters, 1)

    def __str__(self) -> str:
        lines = [f"{'kind':<14}{'sites':>6}{'trainable':>14}{'MB':>9}  points"]
        for row in self.placements:
            lines.append(
                f"{row.kind:<14}{row.num_sites:>6}{row.num_parameters:>14,}{row.num_bytes / 1e6:>9.2f}  "
                + ", ".join(row.points)
            )
        num_sites = sum(row.num_sites for row in self.placements)
        lines.append(
            f"{'all':<14}{num_sites:>6}{self.num_parameters:>14,}{self.num_bytes / 1e6:>9.2f}  "
            f"{self.share:.2%} of the backbone's {self.num_backbone_parameters:,}"
        )
        return "\n".join(lines)
