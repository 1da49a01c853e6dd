"""A ladder beside T5: against a network written out, its laws, its counts."""

import math
from functools import partial

import pytest
import torch
from ladder_t5 import BUCKETS, DISTANCE, build, inputs, with_ladder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# The network written out. `w` are tensors of one block by the library's names.


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def bucket(distance, both):
    """The published rule for a distance of keys to queries."""
    count, offset = BUCKETS, 0
    if both:
        count //= 2
        offset = count if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = count // 2
    if distance < exact:
        return offset + distance
    large = exact + int(math.log(distance / exact) / math.log(DISTANCE / exact) * (count - exact))
    return offset + min(large, count - 1)


def relative(table, length, both):
    rows = [[table[bucket(key - query, both)] for key in range(length)] for query in range(length)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)  # (H, L, L)


def attention(w, name, x, states, heads, bias):
    def split(kind, of):
        return (of @ w[f"{name}.{kind}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)

    scores = split("q", x) @ split("k", states).mT + bias
    return (scores.softmax(-1) @ split("v", states)).transpose(1, 2).flatten(2) @ w[f"{name}.o.weight"].T


def block(w, x, heads, bias, memory=None, cross_bias=None):
    x = x + attention(w, "layer.0.SelfAttention", n := rms(x, w["layer.0.layer_norm.weight"]), n, heads, bias)
    last = 1
    if memory is not None:
        n = rms(x, w["layer.1.layer_norm.weight"])
        x = x + attention(w, "layer.1.EncDecAttention", n, memory, heads, cross_bias)
        last = 2
    n, dense = rms(x, w[f"layer.{last}.layer_norm.weight"]), f"layer.{last}.DenseReluDense"
    if f"{dense}.wi_0.weight" in w:
        gate = nn.functional.gelu(n @ w[f"{dense}.wi_0.weight"].T, approximate="tanh")
        return x + (gate * (n @ w[f"{dense}.wi_1.weight"].T)) @ w[f"{dense}.wo.weight"].T
    return x + (n @ w[f"{dense}.wi.weight"].T).relu() @ w[f"{dense}.wo.weight"].T


def tensors(module):
    return dict(module.state_dict(keep_vars=True))


def climb(side, states, embedded, mix, after_block, run):
    def down(layer, x):
        return x @ layer.weight.T + layer.bias

    s = down(side.first_down, embedded)
    for i, h in enumerate(states):
        if str(i) not in side.blocks:
            continue
        ladder = down(side.downs[str(i)], h) if str(i) in side.downs else None
        w = tensors(side.blocks[str(i)])
        s = mix(run(w, s), ladder, side, i) if after_block else run(w, mix(s, ladder, side, i))
    return rms(s, side.norm.weight)


def reference(model, ladder, batch):
    """Logits of the side network written out; the backbone's states are computed the same way."""
    config, heads = model.config, model.config.num_heads
    mask = torch.where(batch["attention_mask"].bool(), 0.0, -math.inf)[:, None, None]
    causal = torch.full((4, 4), -math.inf).triu(1)
    target = nn.functional.pad(batch["labels"][:, :-1], (1, 0))
    table = model.shared.weight

    def mix(s, ladder_state, side, i):
        if ladder.gate == "none":
            return s + ladder_state
        if ladder.gate == "one":
            return s
        mu = ladder.mu if side.gates is None else 1 / (1 + (-side.gates[i] / ladder.temperature).exp())
        return mu * s + (1 - mu) * ladder_state

    def stack(x, length, side, blocks, bias_mask, both, memories):
        """States after each block, and the side's last one."""
        bias = relative(tensors(blocks[0])["layer.0.SelfAttention.relative_attention_bias.weight"], length, both)
        own = tensors(side.blocks[next(iter(side.blocks))])
        side_bias = relative(own["layer.0.SelfAttention.relative_attention_bias.weight"], length, both)
        states, embedded = [], x
        for each in blocks:
            x = block(tensors(each), x, heads, bias + bias_mask, memories[0], mask)
            states.append(x)
        run = partial(block, heads=heads, bias=side_bias + bias_mask, memory=memories[1], cross_bias=mask)
        return states, climb(side, states, embedded, mix, ladder.add_residual_after, lambda w, s: run(w, s))

    encoder, decoder = ladder.stacks
    states, side_memory = stack(table[batch["input_ids"]], 7, encoder, model.encoder.block, mask, True, (None, None))
    memory = rms(states[-1], model.encoder.final_layer_norm.weight)
    states, s = stack(table[target], 4, decoder, model.decoder.block, causal, False, (memory, side_memory))
    out = s @ ladder.up.weight.T + ladder.up.bias
    if ladder.merge_gate is not None:
        g = torch.sigmoid(ladder.merge_gate / ladder.temperature)
        out = g * out + (1 - g) * rms(states[-1], model.decoder.final_layer_norm.weight)
    return out * config.d_model**-0.5 @ table.T


@pytest.mark.parametrize(
    ("gated", "options"),
    [
        (False, {}),
        (True, {"kept": [[1, 2], [2]]}),
        (False, {"gate": "none", "add_residual_after": True}),
        (False, {"gate": "one", "merge_last": True}),
        (False, {"gate": "schedule-linear", "epochs": 5, "add_residual_after": True}),
    ],
)
def test_is_the_network_written_out(gated, options):
    model = build(gated=gated)
    bank, ladder = with_ladder(model, **options)
    if "epochs" in options:
        ladder.start_epoch(3)
        assert ladder.mu.item() == pytest.approx(0.7)
    batch = inputs()
    found = model(**batch)
    expected = reference(model, ladder, batch)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    parameters = bank.parameters_of("live")
    for a, b in zip(
        torch.autograd.grad(found.logits.square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True),
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()) + 1e-6)


def test_the_backbone_computes_what_it_computes_alone():
    model, batch = build(), inputs()
    plain = model(**batch, output_hidden_states=True)
    with_ladder(model)
    beside = model(**batch, output_hidden_states=True)
    assert torch.equal(plain.encoder_last_hidden_state, beside.encoder_last_hidden_state)
    for one, other in zip(
        (*plain.encoder_hidden_states, *plain.decoder_hidden_states[:-1]),
        (*beside.encoder_hidden_states, *beside.decoder_hidden_states[:-1]),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert not other.requires_grad
    assert not torch.equal(plain.logits, beside.logits)


def test_the_backbone_may_run_without_gradients():
    model, batch = build(), inputs()
    bank, _ = with_ladder(model)
    expected = torch.autograd.grad(model(**batch).loss, bank.parameters_of("live"))
    for block in (*model.encoder.block, *model.decoder.block):
        block.forward = torch.no_grad()(block.forward)
    found = torch.autograd.grad(model(**batch).loss, bank.parameters_of("live"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backbone_drops", [True, False])
def test_the_input_of_a_stack_is_dropped_out_of_once(backbone_drops):
    model = build(dropout_rate=0.25).train(backbone_drops)
    bank, ladder = with_ladder(model)
    bank.train()
    read, own = [], []
    for stack, tower in zip(ladder.stacks, (model.encoder, model.decoder)):
        stack.first_down.register_forward_pre_hook(lambda _, args: own.append(args[0]))
        tower.block[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(**inputs())
    for embedded, given in zip(read, own, strict=True):
        if backbone_drops:
            assert torch.equal(given, embedded)
            assert (embedded == 0).any()
        else:
            kept = given != 0
            assert 0.6 < kept.float().mean() < 0.9
            torch.testing.assert_close(given[kept], embedded[kept] / 0.75)


def test_the_backward_pass_takes_less_than_a_third_of_the_operations_of_training_everything():
    def operations(ladder):
        model = build(d_model=64, d_kv=16, d_ff=256, num_heads=4)
        if ladder:
            with_ladder(model, reduction=8)
        loss = model.requires_grad_(not ladder)(**inputs()).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    assert 0 < operations(True) < operations(False) / 3


def saved_bytes(layers):
    """Bytes of activations kept for the backward pass, of a ladder with one side block per stack."""
    model = build(layers)
    with_ladder(model, kept=[[layers - 1], [layers - 1]])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs()).loss
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    return sum(size for _, size in kept.values())


def test_blocks_without_a_side_block_keep_nothing_for_the_backward_pass():
    assert saved_bytes(2) == saved_bytes(6)


def test_limits_of_the_gate():
    model, batch = build(), inputs()
    _, ladder = with_ladder(model, kept=[[2], [2]])
    for stack in ladder.stacks:
        stack.gates.data.fill_(math.inf)
    _, alone = with_ladder(other := build(), kept=[[2], [2]], gate="one")
    alone.load_state_dict(ladder.state_dict(), strict=False)  # it has no gates and no D_i
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    for stack in ladder.stacks:
        stack.gates.data.fill_(-math.inf)
    before = model(**batch).logits
    for stack in ladder.stacks:
        stack.first_down.weight.data.normal_()
    assert torch.equal(model(**batch).logits, before)


def test_blocks_without_a_side_block_have_no_say_and_no_tensors():
    model, batch = build(), inputs()
    _, ladder = with_ladder(model, kept=[[0], [0]])
    assert [list(stack.blocks) for stack in ladder.stacks] == [["0"], ["0"]]
    assert [list(stack.downs) for stack in ladder.stacks] == [["0"], ["0"]]
    memories = []
    ladder.stacks[0].norm.register_forward_hook(lambda *call: memories.append(call[-1]))
    before = model(**batch).logits
    for later in model.decoder.block[1:]:
        later.layer[0].SelfAttention.o.weight.data.normal_()
    assert torch.equal(model(**batch).logits, before)
    # The decoder's first block reads the encoder's last state, but the side of the encoder does not.
    for later in model.encoder.block[1:]:
        later.layer[0].SelfAttention.o.weight.data.normal_()
    assert not torch.equal(model(**batch).logits, before)
    assert torch.equal(memories[0], memories[2])


BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "layers": 12}
LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16, "layers": 24}
THREE_B = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32, "layers": 24}


@pytest.mark.parametrize(
    ("sizes", "reduction", "kept", "count"),
    [
        (BASE, 8, [1, 2, 3, 5, 6, 7, 9, 10, 11], 3_878_712),
        (BASE, 8, None, 5_097_240),
        (BASE, 8, [2, 3, 6, 7, 10, 11], 2_660_184),
        (BASE, 8, [3, 7, 11], 1_441_656),
        (LARGE, 8, list(range(1, 24, 2)), 9_057_328),
        (THREE_B, 8, [23], 2_494_896),
        (BASE, 4, None, 16_386_072),
    ],
)
def test_published_counts(sizes, reduction, kept, count):
    with torch.device("meta"):
        model = build(buckets=32, **{**sizes, "vocab_size": 32128})
        bank, _ = with_ladder(model, reduction=reduction, kept=None if kept is None else [kept, kept])
    assert sum(p.numel() for p in bank.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": [[0]]}, "kept lists the blocks of 1 stacks"),
        ({"kept": [[0, 3], [0]]}, r"rising numbers from 0 to 2"),
        ({"kept": [[], [0]]}, r"rising numbers"),
        ({"reduction": 5}, r"is no multiple of reduction=5"),
        ({"gate": "schedule-linear"}, "set epochs"),
        ({"side_blocks": None}, "set side_blocks"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        with_ladder(build(), **options)
