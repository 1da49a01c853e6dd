"""Ranks that are threads of one process and meet at a barrier."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

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


@pytest.fixture(scope="session")
def language_models():
    """(model, spec) of a small Llama and a small T5 by name, in float64. Copy a model before changing it."""
    import torch
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
