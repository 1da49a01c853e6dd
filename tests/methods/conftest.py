"""Ranks that are threads of one process and meet at a barrier."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from fulgurite.methods.ranks import Ranks


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank, size, barrier, board):
        super().__init__(rank, size)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "board", board)

    def gather(self, value):
        self.board[self.rank] = pickle.dumps(value)  # as between processes
        self.barrier.wait(timeout=20)
        values = [pickle.loads(self.board[rank]) for rank in range(self.size)]
        self.barrier.wait(timeout=20)
        return values

    def total(self, tensor):
        return tensor.copy_(sum(self.gather(tensor)))


def run_on_ranks(size, work):
    """``work(ranks)`` on every rank at the same time: results, or exceptions, in order of rank."""
    barrier, board = threading.Barrier(size), {}

    def one(rank):
        try:
            return work(ThreadRanks(rank, size, barrier, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.fixture
def on_ranks():
    return run_on_ranks


@pytest.fixture
def peak_bytes():
    """Most bytes of tensors that a call holds at one time, beside those that were there."""

    def measure(call):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max()

    return measure


@pytest.fixture(scope="session")
def language_models():
    """(model, spec) of a small Llama and a small T5 by name, in float64. Copy a model before changing it."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    from fulgurite.backbones.language_specs import language_spec

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
            )
        )
        t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
        )
    return {name: (model.double().eval(), language_spec(model)) for name, model in (("llama", llama), ("t5", t5))}


class Mixing(nn.Module):
    """Residual block whose tokens are mixed where they are real; ``how`` it treats its argument."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        self.query, self.value, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, mask=None, beside=None):
        scores = self.query(x) @ x.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        mixed = self.out(torch.tanh(scores.softmax(-1) @ self.value(x)))
        if beside is not None:
            mixed = mixed + beside
        if self.how == "in place":
            return x.add_(mixed)
        return (x + mixed, mixed) if self.how == "tuple" else x + mixed


class Chain(nn.Module):
    """Blocks one after the other, or with something between, or in another way that a walk must see."""

    def __init__(self, how="plain", count=3):
        super().__init__()
        self.how = how
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Mixing(how) for _ in range(count))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, batch):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        x = torch.tanh(self.stem(x))
        kept = []
        for number, block in enumerate(self.blocks):
            kept.append(x)
            if self.how == "between" and number == 1:
                x = self.norm(x).roll(1, 1)
            if self.how == "written between" and number == 2:
                x.add_(1)
            if self.how == "skip" and number == 2:
                x = block(x, mask, beside=kept[1])
            elif self.how == "twice" and number == 2:
                x = block(self.blocks[0](x, mask), mask)
            else:
                x = block(x, mask=mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x))


def chain_of(how="plain"):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Chain(how).double().eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    padded = [torch.tensor([[1, 1, 1, 1], [1] * n + [0] * (4 - n)]) for n in (1, 2, 3)]
    return model, rows, padded


@pytest.fixture
def chain():
    """``chain(how)``: a `Chain` in float64, batches for it, and masks of their padding."""
    return chain_of
