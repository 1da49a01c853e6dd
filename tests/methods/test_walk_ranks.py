"""A walk of two processes, each with half of the batches and perhaps of the weights, gives what one process gives."""

import sys
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints.tensorfile import map_file

FOLDER = Path(__file__).parent
SCORES = ("ecoflap-zeroth", "ecoflap-first", "iterative", "circuit", "budget")
SCORES += ("tokens-attention", "tokens-frequency", "tokens-centroids")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}  # float64, whose sums over batches are taken in another order


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        import walk_ranks
    finally:
        sys.path.remove(str(FOLDER))
    return walk_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory, pair):
    root = tmp_path_factory.mktemp("ranks")
    pair.run(FOLDER / "walk_ranks.py", root, *SCORES)
    return root


@pytest.mark.parametrize("how", ["whole", "blocks", "root", "resumed"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "gptq"])
def test_two_processes_give_what_one_gives(name, how, script, root):
    one = script.model()
    errors = list(script.compressed(name, one)[0].values())[-5 if how == "resumed" else -10 :]
    two, other = (map_file(root / f"{name}-{how}-{rank}") for rank in range(2))
    assert all(torch.equal(two[key], other[key]) for key in two)
    torch.testing.assert_close(two["errors"], torch.tensor(errors), rtol=1e-6, atol=0)
    before = script.model().state_dict()
    changed = 0
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(two[key], tensor, **TOLERANCE)
        assert torch.equal(two[key] == 0, tensor == 0)
        changed += not torch.equal(tensor, before[key])
    assert changed == 10


@pytest.mark.parametrize("name", SCORES)
def test_what_two_processes_find_out_is_what_one_finds_out(name, script, root):
    expected, two, other = script.scored(name), *(map_file(root / f"{name}-{rank}") for rank in range(2))
    assert expected.keys() == two.keys()
    assert {layer.rpartition(".")[2] for layer in expected} == {"in_proj", "out_proj", "out"}
    for layer, tensor in expected.items():
        assert torch.equal(two[layer], other[layer])
        torch.testing.assert_close(two[layer], tensor.contiguous(), rtol=1e-6, atol=1e-12)
        assert tensor.any()


def test_an_error_of_one_process_ends_both_with_its_text(root):
    text = "'Tensor' object has no attribute 'no_such_thing'"
    told = [f"rank 1 failed: AttributeError: {text}", text]
    assert [(root / f"failed-{rank}").read_text() for rank in range(2)] == told


def test_ranks_of_a_sharded_model_need_as_many_batches(root):
    text = "ranks have [1, 2] batches, and the blocks are sharded: give every process as many"
    assert [(root / f"refused-{rank}").read_text() for rank in range(2)] == [text] * 2
