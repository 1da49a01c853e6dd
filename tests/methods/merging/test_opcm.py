"""OPCM against its definition with full SVDs, what it promises of lengths and angles, and streams."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulgurite.methods.merging.files import merge_files
from fulgurite.methods.merging.opcm import Opcm, OpcmState, orthogonal_part

FLOATS = ("embed.weight", "block.0.mlp.weight", "block.0.mlp.bias", "scale", "conv.weight")


def only(model):
    return {n: model[n] for n in FLOATS}


def length(model, base):
    return torch.cat([(model[n] - base[n]).double().flatten() for n in FLOATS]).norm()


def project(tau, delta, alpha):
    """As written: square U and V, and entries of P set to 0."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=True)
    rank = int((s.cumsum(0) / s.sum() > alpha).nonzero()[0])
    p = u.T @ tau.double() @ v.T
    p.diagonal().zero_()
    p[:rank, :rank] = 0
    return u @ p @ v


def by_definition(base, experts, alpha):
    """The recursion over merged models, with lam at each step."""
    merged, lam = {n: experts[0][n].double() for n in FLOATS}, 1.0
    norms = [length(only(experts[0]), base)]
    for expert in experts[1:]:
        total = {}
        for n in FLOATS:
            delta, tau = merged[n] - base[n], (expert[n] - base[n]).double()
            total[n] = lam * delta + (project(tau, delta, alpha) if tau.dim() == 2 else tau)
        norms.append(length(only(expert), base))
        lam = torch.cat([t.flatten() for t in total.values()]).norm() / (sum(norms) / len(norms))
        merged = {n: base[n] + total[n] / lam for n in FLOATS}
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("keep", [False, True])
def test_is_the_recursion(alpha, keep, base, experts):
    merged = Opcm(alpha, keep=keep)([only(e) for e in experts], only(base))
    for name, expected in by_definition(only(base), experts, alpha).items():
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_the_part_taken_is_orthogonal_to_what_was_merged(shape):
    tau, merged = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = orthogonal_part(tau, merged, 0.6)
    torch.testing.assert_close(part, project(tau, merged, 0.6))
    assert abs(float((part * merged).sum())) < 1e-12
    assert torch.equal(orthogonal_part(tau, torch.zeros(shape, dtype=torch.float64)), tau)


def test_the_merged_change_has_the_mean_length(base, experts):
    merger, base = Opcm(), only(base)
    merged = merger([only(e) for e in experts], base)
    lengths = [length(only(e), base) for e in experts]
    torch.testing.assert_close(length(merged, base), sum(lengths) / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(merger.state().norms).double(), torch.stack(lengths))


def test_a_stream_is_the_list(base, experts):
    expected = Opcm()(experts, base)
    one = Opcm()
    merged = one(experts[:1], base)
    two = Opcm(state=one.state())
    merged = two([merged, experts[1]], base)
    assert two.state() != one.state()
    three = Opcm(state=two.state())
    merged = three([merged, experts[2]], base)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    whole = Opcm()
    whole(experts, base)
    assert three.state().lam == pytest.approx(whole.state().lam, rel=1e-6)
    assert three.state().norms == pytest.approx(whole.state().norms, rel=1e-6)


def test_a_stream_over_files_is_the_list(base, experts, tmp_path):
    for name, model in {"base": base, "0": experts[0], "1": experts[1], "2": experts[2]}.items():
        save_file(model, tmp_path / f"{name}.safetensors")
    first = Opcm()
    start, *given = (tmp_path / f"{name}.safetensors" for name in ("base", "0", "1", "2"))
    merge_files(given[:2], tmp_path / "t2", first, start)
    then = Opcm(state=first.state())
    merge_files([tmp_path / "t2", given[2]], tmp_path / "t3", then, start)
    expected = Opcm()(experts, base)
    merged = load_file(tmp_path / "t3" / "weights.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_excluded_matrices_are_summed(base, experts):
    merger, base = Opcm(exclude=["embed"]), only(base)
    merged = merger([only(e) for e in experts], base)
    total = sum(e["embed.weight"] - base["embed.weight"] for e in experts)
    torch.testing.assert_close(merged["embed.weight"], base["embed.weight"] + total / merger.state().lam)


def test_nothing_new_changes_nothing(base, experts):
    state = OpcmState((1.0, 2.0), 1.4)
    merger = Opcm(state=state)
    merged = merger(experts[:1], base)
    assert all(torch.equal(merged[n], experts[0][n]) for n in merged)
    assert merger.state() == state


def test_what_it_cannot_take_is_refused(base, experts):
    with pytest.raises(ValueError, match="leave out the weights"):
        Opcm()(experts, base, weights=[1, 2, 1])
    with pytest.raises(ValueError, match="norms and lam > 0"):
        OpcmState((), 1.0)
