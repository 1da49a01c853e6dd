"""The branch of LoRA against its plain form, what it keeps for backward, and where it must keep it as it is."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fulgurite.methods.adapters import remade
from fulgurite.methods.adapters.lora import LoRA

WIDTH, OUT = 6, 5
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "gated": lambda z: F.silu(z) * z.sin(),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "tanh": torch.tanh,
    "none": lambda z: z,
}
REMADE = ("gelu", "gelu_new", "silu", "gated", "quick_gelu")


def plain(adapter: LoRA, x, y):
    return y + adapter.scale * (x @ adapter.down.weight.T) @ adapter.up.weight.T


@pytest.fixture
def adapter() -> LoRA:
    torch.manual_seed(0)
    made = LoRA((WIDTH, OUT), rank=2, alpha=3.0).double()
    nn.init.normal_(made.up.weight)
    return made


def inputs(*shape: int, turned: bool = False):
    """z (..., WIDTH), of which x is made, and y (..., OUT); with ``turned`` they are not contiguous."""
    made = torch.Generator().manual_seed(1)
    z, y = (torch.randn(*shape, width, generator=made, dtype=torch.float64) for width in (WIDTH, OUT))
    if turned:
        z, y = (t.transpose(0, -2).contiguous().transpose(0, -2) for t in (z, y))
    return z.requires_grad_(), y.requires_grad_()


def gradients(output, sources, create_graph=False):
    """Of a sum that is not linear in ``output``."""
    return torch.autograd.grad(output.sin().sum(), sources, create_graph=create_graph)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "turned"), [((), False), ((4,), False), ((4, 3), True), ((2, 4, 3), True)])
def test_gradients_are_those_of_the_plain_form(adapter, name, shape, turned):
    z, y = inputs(*shape, turned=turned)
    sources = [z, y, *adapter.parameters()]
    found, expected = (form(ACTIVATIONS[name](1 * z), 1 * y) for form in (adapter, lambda *t: plain(adapter, *t)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    first = [gradients(output, sources, create_graph=True) for output in (found, expected)]
    torch.testing.assert_close(*first, rtol=1e-12, atol=1e-12)
    second = [gradients(torch.cat([t.flatten() for t in each]), sources) for each in first]
    torch.testing.assert_close(*second, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", ["x", "y", "weights", "weights x", "weights y"])
def test_only_some_have_gradients(adapter, wanted):
    z, y = inputs(4, 3)
    z.requires_grad_("x" in wanted)
    y.requires_grad_("y" in wanted)
    adapter.requires_grad_("weights" in wanted)
    sources = [t for t in (z, y, *adapter.parameters()) if t.requires_grad]
    found, expected = (form(F.gelu(1 * z), 1 * y) for form in (adapter, lambda *t: plain(adapter, *t)))
    torch.testing.assert_close(gradients(found, sources), gradients(expected, sources))


def is_kept(adapter: LoRA, make) -> bool:
    """Whether x, which ``make()`` gives, is in memory between forward and backward."""
    x = make()
    storage = StorageWeakRef(x.untyped_storage())
    output = adapter(x, torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype))
    del x
    kept = not storage.expired()
    output.sum().backward()
    return kept


@pytest.mark.parametrize("name", REMADE)
def test_what_autograd_can_make_again_is_not_kept(adapter, name):
    z, _ = inputs(4, 3)
    assert not is_kept(adapter, lambda: ACTIVATIONS[name](1 * z))
    assert is_kept(adapter, lambda: ACTIVATIONS[name](1 * z).clone())


def test_nothing_is_made_of_parameters_or_of_what_has_changed(adapter, monkeypatch):
    z, _ = inputs(4, 3)
    scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    assert is_kept(adapter, lambda: F.gelu(z))
    assert is_kept(adapter, lambda: F.gelu(z.view(3, 4, WIDTH)))
    assert is_kept(adapter, lambda: (1 * z) * scale)
    assert is_kept(adapter, lambda: (1 * z) * scale.view(1, 1, WIDTH))
    assert is_kept(adapter, lambda: F.gelu(1 * z).requires_grad_().mul_(2))
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # as in a version without it
    assert is_kept(adapter, lambda: F.gelu(1 * z))


def test_x_that_was_changed_and_graphs_that_are_gone(adapter):
    z, y = inputs(4, 3)
    x = F.gelu(1 * z)
    with torch.no_grad():
        x[0] = 7.0
    weights = list(adapter.parameters())
    torch.testing.assert_close(gradients(adapter(x, y), weights), gradients(plain(adapter, x, y), weights))
    inner = 1 * z
    x = F.gelu(inner)
    with torch.no_grad():
        inner.zero_()
    torch.testing.assert_close(gradients(adapter(x, y), weights), gradients(plain(adapter, x, y), weights))
    x = F.gelu(1 * z)
    x.sum().backward()
    torch.testing.assert_close(gradients(adapter(x, y), weights), gradients(plain(adapter, x, y), weights))
    inner = 1 * z
    output = adapter(F.gelu(inner), y)
    with torch.no_grad():
        inner.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(output, weights)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(adapter, reentrant):
    """The function outside, inside, and on both sides of what is run again, each run as often as without adapters."""
    z, y = inputs(4, 3)
    sources, runs = [z, y, *adapter.parameters()], []

    def gelu(z):
        runs.append(1)
        return F.gelu(1 * z)

    def again(function, *given):
        return checkpoint(function, *given, use_reentrant=reentrant)

    def gradients_of(output):
        for source in sources:
            source.grad = None
        output.sin().sum().backward()
        return [source.grad for source in sources]

    expected = gradients_of(plain(adapter, F.gelu(z), y))
    forms = {
        "all": lambda: again(lambda z, y: adapter(gelu(z), y), z, y),
        "function": lambda: adapter(again(gelu, z), y),
        "adapter": lambda: again(adapter, gelu(z), y),
    }
    for name, form in forms.items():
        runs.clear()
        output = form()
        assert len(runs) == 1, name
        torch.testing.assert_close(gradients_of(output), expected)
        assert len(runs) == (1 if name == "adapter" else 2), name


@pytest.mark.parametrize("where", ["both", "adapter"])
def test_hooks_on_what_is_saved_see_x(adapter, where):
    z, y = inputs(4, 3)
    packed, outside = [], F.gelu(1 * z)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        x = F.gelu(1 * z) if where == "both" else outside
        output = adapter(x, y)
    assert any(t.data_ptr() == x.data_ptr() for t in packed)
    if where == "both":
        assert remade.recipe_of(x)[1][0] is x  # outside too: giving back what the hooks took may cost
    sources = [z, *adapter.parameters()]
    torch.testing.assert_close(gradients(output, sources), gradients(plain(adapter, F.gelu(1 * z), y), sources))


def test_gradients_of_single_samples_by_transforms(adapter):
    z, y = inputs(4, 3)
    values = {name: tensor.detach() for name, tensor in adapter.named_parameters()}

    def loss(values, z, y):
        return functional_call(adapter, values, (F.gelu(1 * z), y)).sin().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(values, z, y)
    for i in range(len(z)):
        *expected, of_z = gradients(plain(adapter, F.gelu(z), y)[i], [*adapter.parameters(), z])
        torch.testing.assert_close([found[0][name][i] for name in values], list(expected))
        torch.testing.assert_close(found[1][i], of_z[i])


def test_lower_precision(adapter):
    """Under autocast the adapter's values stay float32, whatever enters."""
    adapter = adapter.float()
    z, y = (t.detach().float().requires_grad_() for t in inputs(4, 3))
    sources = [z, y, *adapter.parameters()]
    for kind in (torch.float32, torch.bfloat16):
        for site in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = adapter(F.gelu(1 * z.to(kind)), y.to(site))
                hidden = F.linear(F.gelu(z.to(kind)), adapter.down.weight)
                expected = y.to(site) + adapter.scale * F.linear(hidden, adapter.up.weight)
            assert output.dtype == expected.dtype == site
            torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits
            found = gradients(output, sources)
            assert {t.dtype for t in found} == {torch.float32}
            torch.testing.assert_close(found, gradients(expected, sources), rtol=5e-2, atol=5e-2)


def test_a_fresh_adapter_changes_no_bit():
    adapter = LoRA((WIDTH, OUT), rank=2)
    x, y = torch.randn(4, WIDTH), torch.randn(4, OUT)
    y[0, :3] = torch.tensor([torch.inf, 1e-45, -torch.inf])
    assert torch.equal(adapter(x, y).view(torch.int32), y.view(torch.int32))


def test_thin_layers_are_called_as_modules(adapter):
    """Statistics of their inputs are taken by hooks."""
    z, y = inputs(4, 3)
    seen = []
    for layer in (adapter.down, adapter.up):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapter(z, y)
    torch.testing.assert_close(seen, [z, z @ adapter.down.weight.T])
