import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.aggregation_matrix import aggregation_matrix


@pytest.mark.parametrize("kind", ["full", "relative"])
@pytest.mark.parametrize(("length", "group"), [(5, 1), (3, 4)])
def test_every_matrix_starts_as_the_identity(kind, length, group):
    matrix = aggregation_matrix(kind, length, group)
    for places in (length, length - 1):
        size = places * group
        assert torch.equal(matrix(places)[:size, :size], torch.eye(size))


@pytest.mark.parametrize("group", [1, 3])
def test_a_relative_matrix_depends_on_the_distance_alone(group):
    matrix = aggregation_matrix("relative", 4, group)
    nn.init.normal_(matrix.weight, generator=torch.Generator().manual_seed(0))
    for length in (2, 4, 6):
        made, size = matrix(length), length * group
        expected = torch.zeros(size, size)
        for row in range(size):
            for column in range(size):
                distance = column // group - row // group
                if abs(distance) < 4:
                    expected[row, column] = matrix.weight[distance + 3, row % group, column % group]
        assert torch.equal(made[:size, :size], expected)
