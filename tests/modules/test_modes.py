import pytest
import torch

from fulgurite.methods.routing.centroid import CentroidRouter
from fulgurite.modules.modes import MODES, distinct_pairs, logits_of_rows, mode_weights, take

NUM_STAGES = 3


@pytest.fixture
def routers():
    made = []
    for normalize in (False, True):
        router = CentroidRouter(top_k=2, temperature=0.1, normalize_parts=normalize, width=4, experts=["a", "b", "c"])
        for i, name in enumerate("abc"):
            router.update(torch.eye(4)[i : i + 1] + 0.1, name)
        made.append(router)
    return made


@pytest.fixture
def features():
    return torch.rand(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", range(NUM_STAGES + 1))
def test_rows_are_weights_over_what_was_trained_so_far(mode, stage, routers, features):
    own = torch.tensor([1, 2, 3, 0, 1])
    weights = mode_weights(mode, stage, NUM_STAGES, routers, features, own)
    assert weights.shape == (5, NUM_STAGES + 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert (weights >= 0).all()
    assert not weights[:, stage + 1 :].any()


def test_modes_mean_what_they_say(routers, features):
    own = torch.tensor([1, 2, 3, 0, 1])

    def rows(mode, stage=2):
        return mode_weights(mode, stage, NUM_STAGES, routers, features, own)

    assert rows("zero_shot").tolist() == [[1, 0, 0, 0]] * 5
    assert rows("last").tolist() == [[0, 0, 1, 0]] * 5
    assert rows("average").tolist() == [[0, 0.5, 0.5, 0]] * 5
    # The third domain is not trained yet and the fourth never: both fall back to the model before any stage.
    assert rows("oracle").argmax(-1).tolist() == [1, 2, 0, 0, 1]
    assert (rows("router").amax(-1) == 1).all()
    assert rows("router")[:, 1:].argmax(-1).tolist() == rows("dynamic")[:, 1:].argmax(-1).tolist()
    torch.testing.assert_close(rows("dynamic", 3)[:, 1:], routers[0](features))
    torch.testing.assert_close(rows("second_router", 3)[:, 1:], routers[1](features))


def test_distinct_pairs_give_every_row_back():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, (4, 6, 2), generator=generator) / 2
    sample, weights, inverse = distinct_pairs(rows)
    assert len(sample) < 24
    assert torch.equal(weights[inverse], rows)
    assert torch.equal(sample[inverse], torch.arange(6).expand(4, 6))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_logits_of_rows_equal_one_pass_per_row(chunk):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 7, generator=generator)
    batch = {"id": list("abcdef"), "x": torch.randn(6, 7, generator=generator)}
    rows = torch.randint(2, (4, 6, 3), generator=generator).float()
    calls = []

    def forward(part, weights):
        calls.append(len(weights))
        return (weights @ table) * part["x"]

    out = logits_of_rows(forward, batch, rows, chunk)
    torch.testing.assert_close(out, torch.stack([forward(batch, row) for row in rows]))
    assert max(calls[:-4]) <= chunk


def test_ranks_agree_on_the_number_of_passes():
    batch, rows = {"id": ["a"], "x": torch.ones(1, 2)}, torch.ones(1, 1, 2)
    calls = []

    def forward(part, weights):
        calls.append(1)
        return part["x"]

    logits_of_rows(forward, batch, rows, chunk=4, agree=lambda n: 3)
    assert len(calls) == 3


def test_take_repeats_tensors_and_lists_alike():
    batch = take({"id": ["a", "b"], "x": torch.tensor([1, 2])}, torch.tensor([1, 1, 0]))
    assert batch["id"] == ["b", "b", "a"]
    assert batch["x"].tolist() == [2, 2, 1]
