"""Perplexity against closed forms."""

import math

import pytest
import torch

from fulgurite.metrics.perplexity import perplexity


def test_a_uniform_model_is_as_perplexed_as_there_are_tokens():
    def scored(targets):
        return torch.zeros(*targets.shape, 11), targets

    batches = [torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    assert perplexity(scored, batches) == pytest.approx(11)


def test_every_token_counts_alike_whatever_its_batch():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, 9, generator=generator), torch.randint(9, (6, 4), generator=generator)
    chosen = logits.double().softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    expected = math.exp(-chosen.log().mean())
    for sizes in ([6], [1, 5], [2, 2, 2]):
        parts = zip(logits.split(sizes), targets.split(sizes))
        assert perplexity(lambda part: part, parts) == pytest.approx(expected, rel=1e-6)


def test_no_token_is_refused_and_certain_failure_is_infinite():
    with pytest.raises(ValueError, match="no token"):
        perplexity(lambda part: part, [])
    hopeless = torch.tensor([[[0.0, -1000.0]]]), torch.tensor([[1]])
    assert perplexity(lambda part: part, [hopeless]) == math.inf
