"""A user's project with classes in classes, each of which refuses a ``size`` below 1, in one way or another."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Callback
from torch import nn
from toy_project import Data, Net

from fulgurite.samples import DataError


class Part:
    def __init__(self, size: int = 1, inner: "Part | None" = None):
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")


class Table(Part):
    """Fails by a slip where the size is 2, and for a name that it does not know."""

    def __init__(self, size: int = 1, name: str = "a"):
        super().__init__(size)
        self.value = {"a": 1}[name] if size != 2 else None + 1


class Named(Part):
    def __init__(self, size: int = 1, name: str | None = "a"):
        super().__init__(size)


@dataclass
class Place:
    points: list[str]
    kind: Callable[[nn.Module], nn.Module]


class Kind(nn.Module):
    def __init__(self, site: nn.Module, rank: int = 1):
        super().__init__()
        if rank < 1:
            raise LookupError("no such rank")


class Model(Net):
    def __init__(self, part: Part | None = None, places: list[Place] | None = None, size: int = 1, lr: float = 0.1):
        super().__init__(lr=lr)
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.made = [place.kind(self.layer) for place in places or []]


class Many(Data):
    def __init__(self, parts: list[Part] | None = None, size: int = 12):
        super().__init__()
        if size < 1:
            raise DataError(f"data.size={size} must be at least 1")


class Told(Callback):
    def __init__(self, size: int = 1):
        if size < 1:
            raise ValueError("it is too small")


class Late(Net):
    """Fails when the run is set up: by a slip of its own, or in a function of the package."""

    def __init__(self, how: str = "slip", lr: float = 0.1):
        super().__init__(lr=lr)
        self.how = how

    def configure_optimizers(self):
        if self.how == "package":
            from fulgurite.modules.optimization import ParamGroup, grouped

            grouped(dict(self.named_parameters()), [ParamGroup("nope", 0.1)])
        if self.how == "package slip":
            from fulgurite.modules.facts import read_facts

            read_facts({"info": {"domains": ["a"]}, "stages": [{}]})  # a KeyError
        if self.how == "own":
            raise ValueError("raised on purpose, in the user's own code")
        return int("x")
