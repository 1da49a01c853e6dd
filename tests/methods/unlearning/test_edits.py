"""Edits of one weight: identity, independence of slots, and the model restored to the bit."""

import copy

import pytest
import torch
from torch import nn

from fulgurite.methods.unlearning.edits.attached import attached
from fulgurite.methods.unlearning.edits.base import answers_behind, slots_of
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.methods.unlearning.edits.whole_weight import WholeWeightEdit

KINDS = [LowRankEdit, WholeWeightEdit]


@pytest.fixture
def site():
    torch.manual_seed(0)
    return nn.Linear(6, 5).requires_grad_(False)


def filled(kind, site, items=3, **options):
    edit = kind(site, items=items, **options)
    edit.start(range(items))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return edit.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fresh_edit_changes_no_bit(kind, site, dtype):
    site = site.to(dtype)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    plain = site(x)
    edit = kind(site, items=2)
    edit.start([7, 8])
    with attached(site, edit), slots_of(torch.tensor([0, 1, 1, 0])):
        assert torch.equal(site(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_changed_by_its_own_slot(kind, site):
    edit = filled(kind, site)
    x = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([2, 0, 2, 1, 0])
    with attached(site, edit), slots_of(rows):
        found = site(x)
    for row, slot in enumerate(rows.tolist()):
        expected = x[row] @ (site.weight + edit.change(slot)).T + site.bias
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_never_written_and_leaving_restores_every_bit(kind, site):
    edit, before = filled(kind, site, items=1), copy.deepcopy(site.state_dict())
    x = torch.ones(1, 2, 6)
    plain = site(x)
    with attached(site, edit):
        assert not torch.equal(site(x), plain)
        assert all(torch.equal(site.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(site(x), plain)
    assert not site._forward_hooks


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.4}])
def test_items_edited_together_equal_items_edited_alone(site, options):
    """With noise: the draws of an item depend neither on other items nor on padding on either side."""
    inputs = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
    seeds = [11, 12, 13]

    def trained(slots, padding, behind):
        edit = LowRankEdit(site, items=len(slots), **options).train()
        edit.start([seeds[slot] for slot in slots])
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1)
        # Three positions of the prompt, one of the answer, and further ones of longer answers.
        parts = [torch.zeros(len(slots), padding, 6), inputs[slots], torch.zeros(len(slots), behind - 1, 6)]
        x = torch.cat(parts, dim=1)
        for _ in range(5):
            with attached(site, edit), slots_of(torch.arange(len(slots))), answers_behind(behind):
                site(x)[:, padding : padding + 4].square().mean(dim=(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [edit.change(slot) for slot in range(len(slots))]

    together = trained([2, 0, 1], padding=2, behind=3)
    for place, slot in enumerate([2, 0, 1]):
        (alone,) = trained([slot], padding=0, behind=1)
        torch.testing.assert_close(together[place], alone, rtol=1e-5, atol=1e-6)
        assert alone.abs().max() > 0.1


def test_a_step_is_put_back_into_the_ball(site):
    edit = filled(WholeWeightEdit, site, ball=0.25)
    free = edit.delta.detach().clone()
    edit.project()
    assert torch.equal(edit.delta, free.clamp(-0.25, 0.25))
    assert (free.abs() > 0.25).any()


def test_sizes_are_the_published_ones():
    site = nn.Linear(11008, 4096, bias=False, device="meta")
    assert sum(p.numel() for p in LowRankEdit(site).parameters()) == 30_208
    assert LowRankEdit(site).scale == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_one_item_folds_into_the_weight(kind, site):
    edit = filled(kind, site, items=1)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    with attached(site, edit):
        expected = site(x)
    folded = copy.deepcopy(site)
    folded.load_state_dict(edit.folded(site), strict=False)  # the bias stays
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_unknown_items_are_refused(site):
    edit = filled(LowRankEdit, site)
    with attached(site, edit), pytest.raises(ValueError, match=r"2 rows enter an edit of 3 items.*of none"):
        site(torch.zeros(2, 1, 6))
    with attached(site, edit), slots_of(torch.tensor([0])), pytest.raises(ValueError, match="known of 1"):
        site(torch.zeros(2, 1, 6))


def test_what_cannot_be_edited_is_refused(site):
    with pytest.raises(ValueError, match=r"edits the weight of an nn\.Linear, not of a LayerNorm"):
        LowRankEdit(nn.LayerNorm(4))
    for options, message in [({"rank": 0}, "rank=0"), ({"dropout": 1.0}, "dropout=1.0"), ({"items": 0}, "items=0")]:
        with pytest.raises(ValueError, match=message):
            LowRankEdit(site, **options)
    with pytest.raises(ValueError, match=r"ball=0\.0"):
        WholeWeightEdit(site, ball=0.0)
