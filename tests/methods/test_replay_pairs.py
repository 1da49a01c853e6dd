import logging

import pytest
import torch
from torch import nn

from fulgurite.methods.replay import Replay
from fulgurite.methods.replay_pairs import Chain


class Block(nn.Module):
    """x + gate tanh(W x), as the first of two outputs; counts the examples of each call."""

    def __init__(self, centred=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.centred, self.calls = centred, []

    def forward(self, x, gate, mask=None):
        self.calls.append(len(x))
        x = x - x.mean(0) if self.centred else x
        return x + gate * torch.tanh(x @ self.weight) * mask, gate


class Model(nn.Module):
    """A chain whose gate is fixed, one for each example, or made from the hidden states between two blocks."""

    def __init__(self, gate="fixed", centred=None):
        super().__init__()
        self.blocks, self.gate = nn.ModuleList(Block(number == centred) for number in range(4)), gate

    def forward(self, x):
        gate = {"fixed": torch.tensor([[2.0]]), "examples": torch.ones(len(x), 1, 4)}.get(
            self.gate, torch.ones(1)
        ).double()
        for block in self.blocks:
            gate = x.mean((0, 1)) if self.gate == "hidden" else gate
            x, _ = block(x, gate, mask=torch.ones(len(x), 1, 1).double())
        return x.square().sum()


def case(**options):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Model(**options).eval()
        x = torch.randn(3, 2, 4).double()
    replay = Replay({str(number): block for number, block in enumerate(model.blocks)})
    with replay.recording():
        model(x)
    return model, x, replay


def both(model, x, replay, chain):
    """The result with block 1 changed in two ways, both at once and apart; and the calls of every block."""
    weight, saved = model.blocks[1].weight, model.blocks[1].weight.detach().clone()
    outputs, apart, found = [], [], []
    for step in (0.1, -0.1):
        weight.data = saved + step
        with torch.no_grad():
            apart.append(model(x).item())
        with replay.without(["1"]):
            outputs.append(replay.output_of("1", lambda: model(x)))
    for block in model.blocks:
        block.calls.clear()
    for step, known in zip((0.1, -0.1), chain.ahead("1", tuple(outputs))):
        weight.data = saved + step
        with replay.without(["1"], known):
            found.append(model(x).item())
    return found, apart, [block.calls for block in model.blocks]


@pytest.mark.parametrize("gate", ["fixed", "examples"])
def test_both_versions_go_through_the_chain_at_once(gate):
    model, x, replay = case(gate=gate)
    chain = Chain(replay, list(replay.parts))
    assert chain.next == {"0": "1", "1": "2", "2": "3"}
    found, apart, calls = both(model, x, replay, chain)
    assert found == pytest.approx(apart, rel=1e-12)
    assert apart[0] != pytest.approx(apart[1], rel=1e-3)
    assert calls == [[], [], [6], [6]]


def test_what_is_made_from_hidden_states_between_blocks_is_noticed():
    model, x, replay = case(gate="hidden")
    found, apart, calls = both(model, x, replay, Chain(replay, list(replay.parts)))
    assert found == pytest.approx(apart, rel=1e-12)
    assert calls == [[], [], [6, 3, 3], [6, 3, 3]]


def test_a_block_that_mixes_examples_ends_the_chain(caplog):
    model, x, replay = case(centred=2)
    with caplog.at_level(logging.INFO):
        chain = Chain(replay, list(replay.parts))
    assert chain.next == {"0": "1", "2": "3"}
    assert "2 runs for each sign alone" in caplog.text
    found, apart, calls = both(model, x, replay, chain)
    assert found == pytest.approx(apart, rel=1e-12)
    assert calls == [[], [], [3, 3], [3, 3]]
