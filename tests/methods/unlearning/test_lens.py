"""The logit lens and the states that it reads, against a stack of blocks written out."""

import pytest
import torch
from torch import nn

from fulgurite.methods.unlearning.lens import LogitLens, check_layers, layer_states

VOCABULARY, WIDTH, BLOCKS = 301, 16, 4


class Block(nn.Module):
    """Adds a layer of its input; gives a tuple, as some blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, scale=1.0):
        return (hidden + scale * self.linear(hidden).tanh(),)


@pytest.fixture
def stack():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    norm = nn.RMSNorm(WIDTH)
    nn.init.normal_(norm.weight)
    return blocks, norm, nn.Linear(WIDTH, VOCABULARY, bias=False)


def run(blocks, hidden):
    for block in blocks:
        (hidden,) = block(hidden=hidden)
    return hidden


def by_hand(blocks, hidden):
    states = [hidden]
    for block in blocks:
        states.append(states[-1] + block.linear(states[-1]).tanh())
    return states


def test_states_are_what_blocks_put_out_at_the_positions_asked_for(stack):
    blocks, _, _ = stack
    hidden = torch.randn(2, 5, WIDTH)
    found, result = layer_states(blocks, [0, 2, 4], slice(-2, None), lambda: run(blocks, hidden))
    expected = by_hand(blocks, hidden)
    assert list(found) == [0, 2, 4]
    for layer, states in found.items():
        assert torch.equal(states, expected[layer][:, -2:])
    assert torch.equal(result, expected[-1])


def test_a_pass_that_stops_runs_no_block_after_the_last_layer_and_leaves_no_hook(stack):
    blocks, _, _ = stack
    called = []
    for number, block in enumerate(blocks, 1):
        block.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    hidden = torch.randn(1, 3, WIDTH)
    found, result = layer_states(blocks, [2], slice(None), lambda: run(blocks, hidden), stop=True)
    assert called == [1, 2]
    assert result is None
    assert torch.equal(found[2], by_hand(blocks, hidden)[2])
    assert not any(block._forward_hooks for block in blocks)


def test_the_lens_is_a_distribution_and_that_of_the_last_block_the_models_own(stack):
    blocks, norm, head = stack
    hidden = torch.randn(3, 1, WIDTH)
    states = {layer: state[:, 0] for layer, state in enumerate(by_hand(blocks, hidden))}
    lens = LogitLens(norm, head, BLOCKS)
    probabilities = lens.probabilities(states)
    for layer, state in states.items():
        torch.testing.assert_close(probabilities[layer], (head(norm(state))).softmax(-1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(probabilities[layer].sum(-1), torch.ones(3), rtol=0, atol=1e-5)
    own = head(norm(run(blocks, hidden)[:, 0])).softmax(-1)
    torch.testing.assert_close(probabilities[BLOCKS], own, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lens.log_probabilities(states).exp()[-1], own, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product_does_not_depend_on_how_many_rows_there_are(stack, rows):
    _, norm, head = stack
    states = torch.randn(rows, WIDTH)
    lens = LogitLens(norm, head, BLOCKS)
    with torch.no_grad():
        found = lens.logits({1: states, 2: -states})
    torch.testing.assert_close(found, torch.stack([head(norm(states)), head(norm(-states))]), rtol=1e-5, atol=1e-6)


def test_half_precision_is_read_in_float32(stack):
    _, norm, head = stack
    head.weight.data.mul_(60)
    half = LogitLens(norm.half(), head.half(), BLOCKS)
    states = torch.randn(2, WIDTH).half()
    probabilities = half.probabilities({1: states})[1]
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, head(norm(states)).float().softmax(-1), rtol=1e-2, atol=1e-4)
    assert (probabilities > 0).sum() > (head(norm(states)).softmax(-1) > 0).sum()


def test_the_double_norm_changes_the_last_block_alone(stack):
    blocks, norm, head = stack
    states = {layer: state[:, 0] for layer, state in enumerate(by_hand(blocks, torch.randn(2, 1, WIDTH)))}
    once, twice = (LogitLens(norm, head, BLOCKS, double).probabilities(states) for double in (False, True))
    for layer in range(BLOCKS):
        assert torch.equal(once[layer], twice[layer])
    expected = head(norm(norm(states[BLOCKS]))).softmax(-1)
    torch.testing.assert_close(twice[BLOCKS], expected, rtol=1e-5, atol=1e-7)


def test_a_layer_that_is_not_there_is_named(stack):
    with pytest.raises(ValueError, match=r"model.layers=\[2, 9\]: there is no layer 9.*0 .*to 4"):
        check_layers([2, 9], BLOCKS, "model.layers")
