"""Pooling of grids, numbers of tokens and the sum of embeddings, against loops."""

import pytest
import torch
from torch import nn

from fulgurite.backbones.visual_embedding import ORDERS, VisualEmbedding, downsampled, numbers_of, orders_of


def slow_pool(grid, side):
    """Maxima of cells that begin at floor(i n / side) and end before ceil((i + 1) n / side)."""
    n = int(len(grid) ** 0.5)
    cells = grid.view(n, n, -1)
    spans = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    return torch.stack([cells[a:b, c:d].amax((0, 1)) for a, b in spans for c, d in spans])


@pytest.mark.parametrize(("own", "side"), [(7, 6), (3, 2), (8, 6), (6, 1)])
def test_pooling_is_the_maximum_of_each_cell(own, side):
    grids = torch.randn(2, own * own, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(downsampled(grids, side), torch.stack([slow_pool(grid, side) for grid in grids]))


@pytest.mark.parametrize("side", [6, 8])
def test_a_grid_of_that_size_stays_as_it_is(side):
    grid = torch.randn(1, side * side, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(downsampled(grid, side), grid)


def test_grids_that_cannot_be_pooled():
    with pytest.raises(ValueError, match="50 tokens are no square grid"):
        downsampled(torch.zeros(1, 50, 3), 6)
    with pytest.raises(ValueError, match="5 x 5 cannot be pooled to 6 x 6"):
        downsampled(torch.zeros(1, 25, 3), 6)


def test_tokens_are_counted_within_their_picture():
    picture, order = numbers_of(2, 3, num_images=2)
    assert picture.tolist() == [0, 0, 0, 1, 1, 1]
    assert order.tolist() == [0, 1, 2, 0, 1, 2]
    assert [each.tolist() for each in numbers_of(3, 2)] == [[0] * 6, [0, 1, 2, 3, 4, 5]]
    assert orders_of(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, -1, -1, -1, -1]])).tolist() == [
        [0, 1, 2, 0, 1, 2],
        [0, 1, 0, 1, 2, 3],
    ]


@pytest.mark.parametrize("own", [0, ORDERS])
def test_it_is_the_sum_of_four_terms(own):
    torch.manual_seed(0)
    embedding = VisualEmbedding(7, 6, nn.LayerNorm, own)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    features, table = torch.randn(2, 3, 7), torch.randn(200, 6)
    picture, order = torch.tensor([[0, 0, 1], [1, 0, 0]]), torch.tensor([[0, 1, 0], [5, 4, 99]])
    out = embedding(features, picture, order, table)
    projection, norm = embedding.feat_embedding
    place = embedding.absolute_vis_pos_embedding[1](embedding.absolute_vis_pos_embedding[0].bias)
    for b in range(2):
        for v in range(3):
            seen = norm(projection.weight @ features[b, v] + projection.bias)
            turn = embedding.obj_order_embedding.weight[order[b, v]] if own else table[199 - order[b, v]]
            expected = seen + place + embedding.img_order_embedding.weight[picture[b, v]] + turn
            torch.testing.assert_close(out[b, v], expected)
