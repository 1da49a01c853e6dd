import pytest
import torch


def model(seed, dtype=torch.float32, scale=1.0):
    """A small state dict with matrices, vectors, a scalar, a 4-D kernel, running statistics and integers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return {
        "embed.weight": draw(9, 6),
        "block.0.attn.weight": draw(6, 6),
        "block.0.mlp.weight": draw(8, 6),
        "block.0.mlp.bias": draw(8),
        "block.0.norm.weight": draw(6),
        "conv.weight": draw(3, 2, 2, 2),
        "bn.running_mean": draw(3),
        "bn.running_var": draw(3).abs() + 1,
        "bn.num_batches_tracked": torch.tensor(7),
        "position_ids": torch.arange(5),
        "scale": draw(),
        "head.weight": draw(4, 6),
    }


@pytest.fixture
def base():
    return model(0)


@pytest.fixture
def experts(base):
    """Three fine-tuned copies of ``base``."""
    tuned = []
    for seed in (1, 2, 3):
        change = model(seed, scale=0.1)
        tuned.append({n: t + change[n] if t.is_floating_point() else t.clone() for n, t in base.items()})
    return tuned
