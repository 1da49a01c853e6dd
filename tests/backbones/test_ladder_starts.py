"""How the side blocks of a ladder beside T5 start: as the backbone's, as pruned ones, by an importance."""

import copy

import pytest
import torch
from ladder_t5 import BUCKETS, build, inputs, with_ladder
from torch import nn

from fulgurite.methods.adapters.ladder_start import copy_pruned


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


def test_every_width_of_a_pruned_block_is_divided():
    model = build(1, d_kv=16)  # three heads of 16 beside a width of 24
    _, ladder = with_ladder(model)
    found = {name: tuple(p.shape) for name, p in ladder.stacks[1].blocks["0"].named_parameters()}
    for part in ("layer.0.SelfAttention", "layer.1.EncDecAttention"):
        assert [found.pop(f"{part}.{name}.weight") for name in "qkvo"] == [(12, 6)] * 3 + [(6, 12)]
    assert found.pop("layer.0.SelfAttention.relative_attention_bias.weight") == (BUCKETS, 3)
    assert [found.pop(f"layer.2.DenseReluDense.{name}.weight") for name in ("wi", "wo")] == [(12, 6), (6, 12)]
    assert found == {f"layer.{i}.layer_norm.weight": (6,) for i in range(3)}
    assert ladder.stacks[1].norm.weight.shape == (6,)


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
