"""Sparse masks against training everything and putting back what is outside."""

import copy
import pickle
from functools import partial

import pytest
import torch
from masked_net import Net, build, dense_copy, flat, is_at, loss_of, mask_of, state_of, words
from safetensors.torch import save
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.base import SpanSite
from fulgurite.methods.adapters.folding import fold
from fulgurite.methods.adapters.sparse_mask import SparseMask

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)
# Of a size that gradients of rounding errors alone do not reach, as those of the bias of attention keys.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, eps=1e-4)


def train(model, optimizer, steps=3, accumulate=1, clip=None, after=lambda: None, autocast=False):
    for step in range(steps):
        for part in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, words(seed=10 * step + part))
            loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        after("gradients", parameters)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        after("weights", parameters)
        optimizer.zero_grad()


def nothing(*_):
    """Between backward pass and step."""


def chosen(bank):
    """(P,) bool, True where the live mask is."""
    mask = mask_of(bank)
    out = torch.zeros(mask.num_total, dtype=torch.bool)
    out[mask.positions.long()] = True
    return out


def kept_outside(net, inside):
    """A reference: gradients are masked, and weights outside are put back after every step."""
    start = flat(net)

    def after(when, parameters):
        offset = 0
        for parameter in parameters:
            part = slice(offset, offset + parameter.numel())
            mask = inside[part].view_as(parameter)
            if when == "gradients":
                parameter.grad *= mask
            else:
                parameter.data = torch.where(mask, parameter.data, start[part].view_as(parameter))
            offset += parameter.numel()

    return after


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_density_1_trains_everything_to_the_bit(optimizer):
    net, bank = build(density=1)
    plain = dense_copy(net)
    train(net, optimizer(bank.parameters_of("live")), accumulate=2, after=nothing)
    train(plain, optimizer(plain.parameters()), accumulate=2, after=nothing)
    assert torch.equal(mask_of(bank).values.detach(), flat(plain))
    assert torch.equal(net(words()), plain(words()))


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip": 0.1}, {"autocast": True}], ids=str)
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_only_chosen_entries_train(optimizer, options):
    net, bank = build()
    start, plain, inside = state_of(net), dense_copy(net), chosen(bank)
    train(net, optimizer(bank.parameters_of("live")), after=nothing, **options)
    assert is_at(net, start)
    train(plain, optimizer(plain.parameters()), after=kept_outside(plain, inside), **options)
    expected, values = flat(plain), mask_of(bank).values.detach()
    assert not torch.isclose(values, flat(net)[inside], rtol=1e-3).all()
    # Sums in bfloat16 differ where a weight that needs no gradient is cast another way.
    torch.testing.assert_close(values, expected[inside], rtol=1e-5, atol=1e-6)
    folded = {**start, **fold(bank, net, {"live": 1.0}, bank.sites)}
    plain.load_state_dict(folded)
    assert torch.equal(flat(plain)[~inside], flat(net)[~inside])
    assert torch.equal(flat(plain)[inside], values)
    assert torch.equal(plain(words()), net(words()))


def test_a_fresh_mask_is_the_identity_and_has_int_p_rho_entries():
    for density in (0.01, 0.29, 0.3, 1):
        net, bank = build(density)
        mask, total = mask_of(bank), sum(p.numel() for p in net.parameters())
        assert mask.num_total == total
        assert len(mask.values) == len(mask.positions) == int(total * density)
        assert mask.positions.dtype == torch.int32
        assert bool((mask.positions.diff() > 0).all())
        with torch.no_grad():  # attention takes another way where something trains
            with bank.use(None):
                bare = net(words())
            assert torch.equal(net(words()), bare)
        assert torch.equal(mask.values.detach(), flat(net)[mask.positions.long()])


def test_whole_tensors_count_and_train_alone_where_nothing_else_fits():
    net, _ = build()
    heads = sum(p.numel() for p in (net.embedding.weight, net.head.bias))
    total = sum(p.numel() for p in net.parameters())
    whole = ["embedding.weight", r"head\.bias"]
    net, bank = build(density=(heads + 0.5) / total, whole=whole)
    assert chosen(bank).sum() == heads
    names = dict(net.named_parameters())
    flags = torch.cat([torch.full((p.numel(),), n in ("embedding.weight", "head.bias")) for n, p in names.items()])
    assert torch.equal(chosen(bank), flags)
    plain = dense_copy(net).requires_grad_(False)
    plain.embedding.requires_grad_(True), plain.head.requires_grad_(True)
    train(net, ADAMW(bank.parameters_of("live")), after=nothing)
    train(plain, ADAMW(p for p in plain.parameters() if p.requires_grad), after=nothing)
    assert torch.equal(net(words()), plain(words()))
    with pytest.raises(ValueError, match="set density to"):
        build(density=(heads - 1) / total, whole=whole)
    with pytest.raises(LookupError, match="'hat' matches none"):
        build(whole=["hat"])


@torch.no_grad()
def test_sets_switch_and_leave_no_trace():
    net, bank = build(sets=["a", "b"])
    start = state_of(net)
    for number, name in enumerate(("a", "b")):
        mask_of(bank, name).values.data += 0.1 * (number + 1)
    with bank.use(None):
        bare = net(words())
    outputs = {}
    for name in ("a", "b", "a"):
        with bank.use(name):
            assert torch.equal(outputs.setdefault(name, net(words())), net(words()))
        assert is_at(net, start)
    assert not torch.equal(outputs["a"], outputs["b"])
    assert torch.equal(net(words()), bare)
    bank.copy("a", "live")
    assert torch.equal(net(words()), outputs["a"])
    with pytest.raises(ValueError, match="does not define mixing"), bank.use(torch.eye(3)[:, :2].float()):
        net(words(3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_give_the_same_gradients(reentrant):
    net, bank = build()
    start, gradients = state_of(net), []
    for recompute in (None, reentrant):
        net.recompute = recompute
        mask_of(bank).values.grad = None
        loss_of(net, words()).backward()
        gradients.append(mask_of(bank).values.grad)
        assert is_at(net, start)
    assert torch.equal(*gradients)


def test_several_passes_and_a_module_called_twice():
    net, bank = build(density=0.6)
    plain = dense_copy(net)
    net.blocks[1], plain.blocks[1] = net.blocks[0], plain.blocks[0]
    start = state_of(net)
    for model in (net, plain):
        first, second = loss_of(model, words(seed=1)), loss_of(model, words(seed=2))
        first.backward()
        (second + loss_of(model, words(seed=3))).backward()
    dense = torch.cat([p.grad.flatten() for p in plain.parameters()])
    lost = sum(p.numel() for p in plain.blocks[0].parameters())  # the second block's, which nothing calls
    begin = sum(p.numel() for name, p in plain.named_parameters() if not name.startswith(("running", "head"))) - lost
    positions, gradient = mask_of(bank).positions.long(), mask_of(bank).values.grad
    after = positions >= begin + 2 * lost
    torch.testing.assert_close(gradient[positions < begin + lost], dense[positions[positions < begin + lost]])
    torch.testing.assert_close(gradient[after], dense[positions[after] - lost])
    assert is_at(net, start)


def test_gradients_of_inputs_alone_go_through_the_values():
    net, bank = build(sets=["a"])
    start = state_of(net)
    mask_of(bank, "a").values.data += 0.3
    folded = dense_copy(net)
    folded.load_state_dict({**start, **fold(bank, net, {"a": 1.0}, bank.sites)})
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(folded.blocks[0](x).square().sum(), x)
    with bank.use("a"):
        (found,) = torch.autograd.grad(net.blocks[0](x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert is_at(net, start)
    bank.copy("a", "live")
    (found,) = torch.autograd.grad(net.blocks[0](x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert is_at(net, start)


def test_what_cannot_be_right_is_refused():
    net, bank = build(score="label")
    with torch.no_grad():
        net(words())
    with pytest.raises(ValueError, match="give scores to set_scores"):
        net(words())
    net, bank = build()
    loss = loss_of(net, words())
    mask_of(bank).values.data.add_(0)
    with torch.no_grad():
        mask_of(bank).values.add_(1)
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward"):
        loss.backward()
    with pytest.raises(ValueError, match="'cell' is a LSTM"):
        SparseMask([SpanSite("cell", nn.LSTM(2, 2), "parameters")])
    with pytest.raises(ValueError, match="density=0"):
        build(density=0)


def test_a_call_that_fails_leaves_the_backbone_as_it_was():
    net, _ = build()
    start, good = state_of(net), net(words())
    with pytest.raises(IndexError):
        net.embedding(torch.tensor([99]))
    assert is_at(net, start)
    assert torch.equal(net(words()), good)


def test_copies_and_pickles_have_values_of_their_own():
    owner = nn.ModuleDict(dict(zip(("net", "bank"), build())))
    loss_of(owner["net"], words()).backward()
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert torch.equal(other["net"](words()), owner["net"](words()))
        mask_of(other["bank"]).values.data += 1
        assert not torch.equal(other["net"](words()), owner["net"](words()))
        loss_of(other["net"], words()).backward()


def test_a_bfloat16_backbone_has_wide_values():
    net = Net().to(torch.bfloat16).requires_grad_(False).eval()
    bank = AdapterBank(net, [Placement(["parameters"], partial(SparseMask, density=0.5, score="magnitude"))], ())
    assert mask_of(bank).values.dtype == torch.float32
    with bank.use(None):
        bare = net(words())
    assert torch.equal(net(words()), bare)
    before = mask_of(bank).values.detach().clone()
    train(net, ADAMW(bank.parameters_of("live")), after=nothing)
    assert bool((mask_of(bank).values != before).all(0))


def test_what_is_stored_and_kept_by_the_optimizer_is_proportional_to_the_entries():
    site = SpanSite("layer", nn.Linear(400, 500).requires_grad_(False), "parameters")
    mask = SparseMask([site], density=0.25, score="random")
    k = int(0.25 * 200_500)
    assert abs(len(save(mask.state_dict())) / (8 * k) - 1) < 0.01
    optimizer = ADAMW(mask.parameters())
    mask.values.grad = torch.ones_like(mask.values)
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[mask.values].values() if t.dim()) == 2 * k
