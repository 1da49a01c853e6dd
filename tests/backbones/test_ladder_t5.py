"""A ladder beside transformers' T5: against a network written out, its laws, its counts, and decoding with caches."""

import copy
import dataclasses
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fulgurite.backbones.language_specs import t5_spec
from fulgurite.backbones.side_blocks import side_blocks_of
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned

POINTS = ["encoder_block", "decoder_block", "read_out"]
BUCKETS, DISTANCE = 8, 20


class ReadOut(nn.Module):
    """The place between a decoder and the head."""

    def forward(self, x):
        return x


def after(slot, module, args, output):
    output.last_hidden_state = slot(output.last_hidden_state)
    return output


def build(layers=3, gated=False, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_heads": 3, "vocab_size": 40} | sizes
    config = T5Config(
        num_layers=layers,
        num_decoder_layers=layers,
        relative_attention_num_buckets=sizes.pop("buckets", BUCKETS),
        relative_attention_max_distance=DISTANCE,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
        initializer_factor=2.0,
        **sizes,
    )
    model = T5ForConditionalGeneration(config)
    if model.device.type != "meta":
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    model.read_out = ReadOut()
    model.decoder.register_forward_hook(partial(after, model.read_out))
    points = {f"{s}_block": (rf"{s}\.block\.\d+", layers) for s in ("encoder", "decoder")}
    model.spec = dataclasses.replace(t5_spec(config), points=points | {"read_out": ("read_out", 1)})
    return model.requires_grad_(False).eval()


def with_ladder(model, seed=1, **options):
    kind = partial(LadderSide, **{"side_blocks": side_blocks_of, "reduction": 4} | options)
    bank = AdapterBank(model, [Placement(POINTS, kind)], sets=()).eval()
    ladder = bank.adapters_of("live")["placement-0"]
    if model.device.type != "meta":
        with torch.no_grad():
            for stack in ladder.stacks:
                if stack.gates is not None:
                    stack.gates.copy_(torch.linspace(-0.1, 0.15, len(stack.gates)))
    return bank, ladder


def inputs():
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = mask[2, 4:] = 0
    return {
        "input_ids": torch.randint(2, 40, (3, 7), generator=g),
        "attention_mask": mask,
        "labels": torch.randint(2, 40, (3, 4), generator=g),
    }


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


@pytest.mark.parametrize("gate", ["one", "none"])
def test_a_copy_of_the_backbone_gives_its_logits(gate):
    model, batch = build(), inputs()
    plain = model(**batch).logits
    _, ladder = with_ladder(model, reduction=1, gate=gate)
    copy_pruned(ladder, model, model.spec)
    with torch.no_grad():
        for layer in (*(stack.first_down for stack in ladder.stacks), ladder.up):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (layer for stack in ladder.stacks for layer in stack.downs.values()):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_caches_is_decoding_anew(beams):
    model, batch = build(), inputs()
    with_ladder(model, merge_last=True)
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    del batch["labels"]
    cached = model.generate(**batch, use_cache=True, **options)
    anew = model.generate(**batch, use_cache=False, **options)
    assert torch.equal(cached.sequences, anew.sequences)
    for one, other in zip(cached.scores, anew.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_steps_with_a_cache_are_one_pass():
    model, batch = build(), inputs()
    with_ladder(model)
    whole = model(**batch).logits
    ids = nn.functional.pad(batch.pop("labels")[:, :-1], (1, 0))
    first = model(**batch, decoder_input_ids=ids[:, :2], use_cache=True)
    states, cache, steps = (first.encoder_last_hidden_state,), first.cache, [first.logits]
    for t in (2, 3):
        step = model(
            encoder_outputs=states,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=ids[:, t : t + 1],
            cache=cache,
            use_cache=True,
        )
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.self_attention_cache.layers[3].keys.shape == (3, 3, 4, 2)  # behind the backbone's 3, a quarter as wide


class Owner(nn.Module):
    """A backbone with its bank."""

    def __init__(self):
        super().__init__()
        self.model = build()
        self.bank, _ = with_ladder(self.model)


def test_copies_and_pickles_go_on_alone():
    owner, batch = Owner(), inputs()
    before = owner.model(**batch).logits
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert torch.equal(other.model(**batch).logits, before)
        with torch.no_grad():
            other.bank.adapters_of("live")["placement-0"].up.bias.add_(1)
        assert not torch.equal(other.model(**batch).logits, before)
    assert torch.equal(owner.model(**batch).logits, before)


def test_starts_by_an_importance_over_names_of_the_backbone():
    model = build(2)
    _, ladder = with_ladder(model)
    importance = {name: p.detach() ** 2 + 1 for name, p in model.named_parameters()}
    first, second = (1.0, 7.0)
    for column in range(6):  # of the table, units 0 to 5 weigh most
        importance["shared.weight"][:, column] = 10 + column
    copy_pruned(ladder, model, model.spec, {name: first * t for name, t in importance.items()})
    start = copy.deepcopy(ladder.state_dict())
    norm = model.encoder.block[0].layer[0].layer_norm.weight
    assert torch.equal(ladder.stacks[0].blocks["0"].layer[0].layer_norm.weight, norm[:6])
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(ladder.stacks[0].blocks["0"].layer[0].SelfAttention.relative_attention_bias.weight, table)
    copy_pruned(ladder, model, model.spec, {name: second * t for name, t in importance.items()})
    assert all(torch.equal(start[name], tensor) for name, tensor in ladder.state_dict().items())
    del importance["encoder.block.1.layer.0.SelfAttention.k.weight"]
    with pytest.raises(ValueError, match=r"'layer\.0\.SelfAttention\.k\.weight' is missing"):
        copy_pruned(ladder, model, model.spec, importance)


def test_a_dropped_first_block_hands_its_table_on():
    model = build()
    _, ladder = with_ladder(model, kept=[[1, 2], [2]])
    for stack, blocks, key in ((0, model.encoder.block, "1"), (1, model.decoder.block, "2")):
        own = ladder.stacks[stack].blocks[key].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(own, blocks[0].layer[0].SelfAttention.relative_attention_bias.weight)


def test_consistent_start_keeps_one_set_of_units_for_the_stream():
    model = build()
    _, ladder = with_ladder(model, residual="consistent")
    blocks = model.encoder.block
    norms = [ladder.stacks[0].blocks[str(i)].layer[j].layer_norm.weight for i in range(3) for j in (0, 1)]
    whole = [blocks[i].layer[j].layer_norm.weight for i in range(3) for j in (0, 1)]
    units = [[int((own == all_).nonzero()) for own in side] for side, all_ in zip(norms, whole)]
    assert all(each == units[0] for each in units)


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


def test_refuses_states_that_are_not_its_own():
    model, batch = build(), inputs()
    with_ladder(model)
    states = (torch.zeros(3, 7, 24),)
    with pytest.raises(ValueError, match="has not passed the stack of 'encoder"):
        model(encoder_outputs=states, labels=batch["labels"])
    model(**batch)
    with pytest.raises(ValueError, match="2 rows follows an encoder pass of 3 samples"):
        model(encoder_outputs=(states[0][:2],), labels=batch["labels"][:2])
    model.encoder.block[1].layer[1].DenseReluDense.wi.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="needs gradients"):
        model(**batch)
