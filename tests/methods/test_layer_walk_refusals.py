"""What a walk refuses, by name, before or while it runs."""

import pytest
import torch
from torch import nn

from fulgurite.methods.compression import matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.structure import ModelSpec, Tower

SPEC = ModelSpec((Tower("chain", r"blocks\.\d+", 3, 6),))


def test_training_mode_is_refused(chain):
    model, rows, _ = chain()
    with pytest.raises(ValueError, match="Chain is in training mode"):
        LayerWalk(model.train(), SPEC, rows, model)


def test_a_cache_is_refused(language_models):
    model, spec = language_models["llama"]
    walk = LayerWalk(model, spec, [torch.tensor([[3, 4, 5, 6]])], lambda ids: model(input_ids=ids, use_cache=True))
    with pytest.raises(ValueError, match=r"model\.layers\.0 is given a DynamicCache: .*use_cache=False"):
        next(iter(walk))


def test_a_block_that_is_called_twice_is_refused(chain):
    model, rows, _ = chain("twice")
    with pytest.raises(ValueError, match=r"blocks\.0 is called 2 times by a batch"):
        next(iter(LayerWalk(model, SPEC, rows, model)))


def test_blocks_that_are_named_out_of_order_are_refused(chain):
    model, rows, _ = chain()
    model.forward = lambda x: model.blocks[0](model.blocks[2](model.blocks[1](model.stem(x))))
    with pytest.raises(ValueError, match=r"blocks\.1 is called before blocks\.0"):
        next(iter(LayerWalk(model, SPEC, rows, model)))


def test_a_block_that_is_not_reached_is_named(chain):
    model, rows, _ = chain()
    model.forward = lambda x: model.blocks[0](model.stem(x))
    walk = LayerWalk(model, SPEC, rows, model)
    with pytest.raises(ValueError, match=r"blocks\.1 is not reached"):
        list(walk)


def test_layers_that_are_not_called_are_named(chain):
    model, rows, _ = chain()
    for block in model.blocks:
        block.forward = lambda x, mask=None, block=block: x + nn.functional.linear(block.query(x), block.out.weight)
    block = next(iter(LayerWalk(model, SPEC, rows, model)))
    with pytest.raises(ValueError, match=r"\['blocks\.0\.out', 'blocks\.0\.value'\] were not called as modules"):
        block.input_groups(block.linears())


def test_a_pattern_that_matches_a_convolution_is_refused(chain):
    model, rows, _ = chain()
    model.blocks[1].conv = nn.Conv1d(6, 6, 1)
    with pytest.raises(ValueError, match=r"blocks\.1\.conv: Conv1d is no linear layer.*leave it out of"):
        matrices(LayerWalk(model, SPEC, rows, model), r"blocks\.\d+\..*")
    assert len(matrices(LayerWalk(model, SPEC, rows, model), r"blocks\.\d+\.(query|value|out)")) == 9
    assert len(matrices(LayerWalk(model, SPEC, rows, model))) == 9


def test_every_rank_needs_data(on_ranks, chain):
    model, rows, _ = chain()
    found = on_ranks(2, lambda ranks: list(LayerWalk(model, SPEC, rows[ranks.rank + 2 :], model, ranks=ranks)))
    assert [str(each) for each in found] == ["ranks [1] have no calibration data: give every process a batch"] * 2


def test_an_error_on_one_rank_ends_all(on_ranks, chain):
    def walk(ranks):
        model, rows, padded = chain()
        masks = lambda batch, names: dict.fromkeys(names, padded[0][:, ranks.rank :])  # noqa: E731
        next(iter(LayerWalk(model, SPEC, rows, model, masks, ranks))).grams([["blocks.0.out"]])

    good, bad = on_ranks(2, walk)
    assert "rank 1 failed: ValueError: blocks.0.out: a mask of (2, 3) does not fit" in str(good)
    assert isinstance(bad, ValueError)


def test_an_error_between_blocks_on_one_rank_ends_all(on_ranks, chain):
    def walk(ranks):
        model, rows, _ = chain()
        for block in LayerWalk(model, SPEC, rows, model, ranks=ranks):
            if ranks.rank:
                block.module.forward = lambda *_, **__: {}["hidden"]

    good, bad = on_ranks(2, walk)
    assert str(good) == "rank 1 failed: KeyError: 'hidden'"
    assert isinstance(bad, KeyError)
