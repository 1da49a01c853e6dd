"""White-box attacks against full sorts, and the laws that they obey."""

import itertools

import pytest
import torch

from fulgurite.methods.unlearning.attacks.base import contains
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.probability_delta import ProbabilityDelta, SecondDifference
from fulgurite.methods.unlearning.attacks.top_ids import top_ids

LAYERS = [3, 5, 8, 9]


def lens_of(rows: int = 3, size: int = 401) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer: (3 * torch.randn(rows, size, generator=generator)).softmax(-1) for layer in LAYERS}


def first(values, k, largest):
    """By value, then by id."""
    order = sorted(range(len(values)), key=lambda j: (-values[j] if largest else values[j], j))
    return order[:k]


@pytest.mark.parametrize("size", [5, 128, 129, 401])
@pytest.mark.parametrize("largest", [True, False])
def test_the_first_entries_are_those_of_a_full_sort(size, largest):
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(0, 9, (4, size), generator=generator).float()  # many ties
    values[0] = 0.0
    values[1, :3] = torch.inf
    values[2, -2:] = -torch.inf
    for k in (1, 4, 5):
        expected = [first(row.tolist(), k, largest) for row in values]
        assert top_ids(values, k, largest).tolist() == expected


def test_more_than_the_vocabulary_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="k=6 must be between 1 and the 5 entries"):
        top_ids(torch.zeros(1, 5), 6)
    with pytest.raises(ValueError, match="not numbers"):
        top_ids(torch.tensor([[0.0, torch.nan]]), 1)


def test_head_projection_takes_the_likeliest_of_each_layer():
    lens = lens_of()
    attack = HeadProjection(LAYERS, k=3)
    found = attack.candidates(lens)
    assert found.shape == (3, attack.budget)
    assert attack.budget == 12
    for item, layer in itertools.product(range(3), range(4)):
        expected = first(lens[LAYERS[layer]][item].tolist(), 3, True)
        assert found[item, 3 * layer : 3 * layer + 3].tolist() == expected
    assert HeadProjection([9], k=1).candidates(lens)[:, 0].tolist() == lens[9].argmax(-1).tolist()


@pytest.mark.parametrize("kind", [ProbabilityDelta, SecondDifference])
def test_differences_take_both_ends_of_neighbours_in_the_list(kind):
    lens = lens_of()
    rows = torch.stack([lens[layer] for layer in LAYERS])
    changes = rows.diff(dim=0) if kind is ProbabilityDelta else rows.diff(dim=0).diff(dim=0)
    torch.testing.assert_close(changes.sum(-1), torch.zeros(changes.shape[:2]), rtol=0, atol=1e-6)
    attack = kind(LAYERS, k=2)
    found = attack.candidates(lens)
    assert found.shape == (3, attack.budget)
    for item in range(3):
        expected = [id for change in changes for end in (True, False) for id in first(change[item].tolist(), 2, end)]
        assert found[item].tolist() == expected
    assert all(torch.equal(lens[layer], row) for layer, row in zip(LAYERS, rows))  # the lens is left as it was


def test_nothing_changes_in_a_constant_stack_so_that_ties_go_to_the_lowest_ids():
    row = torch.linspace(1, 2, 300)[None].softmax(-1)
    found = ProbabilityDelta([1, 2, 3], k=2).candidates(dict.fromkeys([1, 2, 3], row))
    assert found.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1]]


def test_success_grows_with_k_and_with_the_layers():
    lens = lens_of(rows=200)
    token = torch.randint(401, (200,), generator=torch.Generator().manual_seed(1))
    for make in (HeadProjection, ProbabilityDelta, SecondDifference):
        hits = [contains(make(LAYERS, k).candidates(lens), token) for k in (1, 2, 8, 30)]
        assert all((less <= more).all() for less, more in itertools.pairwise(hits))
    few, all_of = (contains(HeadProjection(layers, 8).candidates(lens), token) for layers in (LAYERS[:2], LAYERS))
    assert (few <= all_of).all()


def test_a_random_guesser_succeeds_in_b_of_v():
    rows, size = 4000, 200
    lens = {1: torch.rand(rows, size, generator=torch.Generator().manual_seed(2))}
    token = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(3))
    rate = contains(HeadProjection([1], k=10).candidates(lens), token).float().mean()
    assert abs(float(rate) - 10 / size) < 4 * (0.05 * 0.95 / rows) ** 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbabilityDelta([3]), "are 1, and it takes 2 or more"),
        (lambda: SecondDifference([3, 4]), "are 2, and it takes 3 or more"),
        (lambda: HeadProjection([]), "are 0, and it takes 1 or more"),
        (lambda: HeadProjection([4, 3]), "must rise"),
        (lambda: HeadProjection([3, 3]), "must rise"),
        (lambda: HeadProjection([3], k=0), "k=0"),
    ],
)
def test_wrong_layers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
