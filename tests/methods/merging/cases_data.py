import torch

from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.regmean import RegMean

SHAPES = {
    "embed.weight": (9, 6),
    "block.0.mlp.weight": (8, 6),
    "block.0.norm.weight": (6,),
    "conv.weight": (3, 2, 2, 2),
    "scale": (),
}


def fishers(seed=5):
    """Squares, some of them 0, for three experts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator).clamp(min=-0.5).add(0.5).square()  # noqa: E731
    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(3)]


def grams(seed=6):
    """Grams of three experts; those of one layer are of fewer rows than columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"block.0.attn": 4, "block.0.mlp": 40, "head": 40}
    inputs = [{name: torch.randn(n, 6, generator=generator) for name, n in rows.items()} for _ in range(3)]
    return [{name: x.T @ x / len(x) for name, x in each.items()} for each in inputs]


CASES = [
    (Fisher().use(fishers()), 3, True),
    (Fisher(favor_target=False, normalize=False, floor=0.0).use(fishers()), 3, True),
    (RegMean().use(grams()), 3, True),
    (RegMean(offdiag=1.0).use(grams(), transposed=["block.0.attn"]), 3, True),
    (RegMean(offdiag=1.0, ridge=0.0).use(grams()), 3, True),
]
