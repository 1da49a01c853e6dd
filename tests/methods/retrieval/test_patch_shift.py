"""The patch shift against positions written out, and a rule for one token at a time."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.patch_shift import PatchShift, shift_patches

POSITIONS = {
    50: ([1, 8, 15, 22, 29, 36, 43], [4, 11, 18, 25, 32, 39, 46]),
    197: ([1, 29, 57, 85, 113, 141, 169], [4, 32, 60, 88, 116, 144, 172]),
}


def tokens(videos, frames, count, width=2):
    return torch.randn(videos * frames, count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", POSITIONS)
def test_positions(count):
    from_before, from_after = POSITIONS[count]
    x = tokens(2, 3, count)
    before = x.clone()
    shifted = shift_patches(x, 3).view(2, 3, count, 2)
    assert torch.equal(x, before)
    x = x.view(2, 3, count, 2)
    for v in range(2):
        for t in range(3):
            for n in range(count):
                source = t - (n in from_before) + (n in from_after)
                source = source if 0 <= source < 3 else t
                assert torch.equal(shifted[v, t, n], x[v, source, n]), (v, t, n)


def test_single_frames_stay():
    x = tokens(4, 1, 50)
    assert torch.equal(shift_patches(x, 1), x)


def test_videos_do_not_read_each_other():
    x = tokens(3, 4, 50)
    shifted = shift_patches(x, 4)
    order = [2, 0, 1]
    permuted = shift_patches(x.view(3, 4, 50, 2)[order].flatten(0, 1), 4)
    assert torch.equal(permuted.view(3, 4, 50, 2), shifted.view(3, 4, 50, 2)[order])
    x[4:8] = torch.nan
    assert not shift_patches(x, 4)[[0, 1, 2, 3, 8, 9, 10, 11]].isnan().any()


def test_frames_that_are_no_whole_videos_or_have_few_tokens_are_errors():
    with pytest.raises(ValueError, match="8 frames are not whole videos of 3"):
        shift_patches(tokens(2, 4, 50), 3)
    with pytest.raises(ValueError, match="a frame has 6 tokens and needs 7 or more"):
        shift_patches(tokens(2, 4, 6), 4)


class Tower(nn.Module):
    """One residual block whose norm is hooked, and the hook."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.out = nn.LayerNorm(2), nn.Linear(2, 2)
        self.shift = PatchShift()
        self.shift.attach([self.ln_1])

    def forward(self, x):
        return x + self.out(self.ln_1(x))


def copied(tower):
    return copy.deepcopy(tower)


def pickled(tower):
    return pickle.loads(pickle.dumps(tower))


@pytest.mark.parametrize("again", [lambda tower: tower, copied, pickled], ids=["itself", "copied", "pickled"])
def test_the_hook_shifts_within_its_frames_only(again):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = Tower()
    tower, x = again(first), tokens(2, 3, 50)
    assert sorted(tower.state_dict()) == ["ln_1.bias", "ln_1.weight", "out.bias", "out.weight"]
    plain = x + tower.out(nn.functional.layer_norm(x, (2,)))
    shifted = x + tower.out(shift_patches(nn.functional.layer_norm(x, (2,)), 3))
    with tower.shift.frames(3):
        torch.testing.assert_close(tower(x), shifted)
        with tower.shift.frames(1):
            torch.testing.assert_close(tower(x), plain)
        torch.testing.assert_close(tower(x), shifted)
        if tower is not first:
            torch.testing.assert_close(first(x), plain)
    with pytest.raises(ValueError, match="whole videos"), tower.shift.frames(4):
        tower(x)
    torch.testing.assert_close(tower(x), plain)
