import torch

from fulgurite.methods.merging.elected import elected_task_vectors


def models(seed=0, experts=3):
    generator = torch.Generator().manual_seed(seed)
    base = {"a": torch.randn(6, 5, generator=generator), "b": torch.randn(11, generator=generator)}
    moved = [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(experts)]
    return base, moved


def reference(experts, base, density):
    """Over one flat vector per expert, by sorting."""
    flat = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in sorted(base)]) for e in experts])
    keep = max(int(density * flat.shape[1]), 1)
    trimmed = torch.zeros_like(flat)
    for row, tau in zip(trimmed, flat):
        index = tau.abs().argsort(descending=True)[:keep]
        row[index] = tau[index]
    signs = trimmed.sum(0).sign()
    return torch.where(trimmed.sign() == signs, trimmed, 0)


def test_agrees_with_sorting_and_voting():
    for density in (0.2, 0.5, 1.0):
        base, experts = models()
        found = elected_task_vectors(experts, base, density)
        flat = torch.stack([torch.cat([each[n].flatten() for n in sorted(base)]) for each in found])
        torch.testing.assert_close(flat, reference(experts, base, density), rtol=0, atol=0)


def test_one_expert_is_only_trimmed():
    base, (expert,) = models(experts=1)
    (whole,) = elected_task_vectors([expert], base, 1.0)
    assert all(torch.equal(whole[name], expert[name] - base[name]) for name in base)


def test_inputs_stay_as_they_are():
    base, experts = models()
    before = [{n: t.clone() for n, t in each.items()} for each in (base, *experts)]
    elected_task_vectors(experts, base, 0.3)
    for kept, each in zip(before, (base, *experts)):
        assert all(torch.equal(kept[name], each[name]) for name in kept)
