"""A ladder beside VL-BART and VL-T5: what the backbone sees, what trains, and writing with caches."""

from functools import partial

import pytest
import torch

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned
from fulgurite.methods.adapters.replace import Replace

POINTS = ["embedded", "encoder_block", "decoder_block", "read_out"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["bart", "t5"])
def model(request, make_generative):
    return make_generative(request.param, train_dropout="off").eval()


def batch_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 3, 5])[:, None]
    ids = torch.randint(4, 40, mask.shape, generator=g).masked_fill(~mask, 1)
    picture = torch.tensor([[0, 0, 0, 0], [0, 0, -1, -1], [0, 0, 0, 0]])
    return {"text": ids, "text_mask": mask, "features": torch.randn(3, 4, 12, generator=g), "picture": picture}


def targets():
    return torch.randint(4, 40, (3, 4), generator=torch.Generator().manual_seed(1))


def with_ladder(model, **options):
    placements = [
        Placement(["visual_embedding"], Replace),
        Placement(POINTS, partial(LadderSide, **{"reduction": 2} | options)),
    ]
    bank = AdapterBank(model, placements, sets=()).eval()
    return bank, bank.adapters_of("live")["placement-1"]


def test_the_backbone_sees_text_alone_and_the_side_all(model):
    batch = batch_of()
    bare = {name: batch[name] for name in ("text", "text_mask")}
    expected, _ = model.encode(bare)
    bank, ladder = with_ladder(model)
    lengths = []
    ladder.stacks[0].norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    states, mask = model.encode(batch)
    assert torch.equal(states, expected)
    assert not states.requires_grad
    assert mask.shape == (3, 6)
    assert lengths == [10]
    first = model(batch, targets())
    batch["features"] = batch["features"] + 1
    assert not torch.allclose(first, model(batch, targets()), atol=1e-4)
    model(batch, targets()).square().mean().backward()
    assert all(p.grad is not None for p in bank.parameters_of("live"))
    assert all(p.grad is None for p in model.parameters())


def test_text_and_vision_leaves_the_backbone_as_it_is(model):
    batch = batch_of()
    expected, mask = model.encode(batch)
    with_ladder(model, ladder_inputs="text_and_vision")
    states, same = model.encode(batch)
    assert torch.equal(states, expected)
    assert torch.equal(mask, same)
    assert not states.requires_grad


@pytest.mark.parametrize("ladder_inputs", ["text", "text_and_vision"])
def test_padding_changes_no_other_row(model, ladder_inputs):
    """A row with fewer visual tokens gives the same when it is alone."""
    batch, labels = batch_of(), targets()
    with_ladder(model, ladder_inputs=ladder_inputs)
    together = model(batch, labels)
    alone = {
        "text": batch["text"][1:2, :3],
        "text_mask": batch["text_mask"][1:2, :3],
        "features": batch["features"][1:2, :2],
        "picture": batch["picture"][1:2, :2],
    }
    torch.testing.assert_close(model(alone, labels[1:2]), together[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ladder_inputs", ["text", "text_and_vision"])
def test_writes_what_full_passes_would(model, ladder_inputs):
    batch = batch_of()
    with_ladder(model, ladder_inputs=ladder_inputs)
    written = model.generate_ids(batch, max_new_tokens=4)
    with torch.no_grad():
        likeliest = model(batch, written).argmax(-1)
    end = model.language.config.eos_token_id
    before_end = torch.cat([torch.ones(3, 1, dtype=torch.bool), (written[:, :-1] != end).cumprod(1).bool()], dim=1)
    assert torch.equal(written[before_end], likeliest[before_end])
    assert model.generate_ids(batch, num_beams=3, max_new_tokens=4).shape[0] == 3


def test_starts_from_the_backbones_spec(model):
    _, ladder = with_ladder(model, reduction=2)
    copy_pruned(ladder, model, model.spec, {name: p.detach() ** 2 for name, p in model.named_parameters()})
    assert all(torch.isfinite(p).all() for p in ladder.parameters())
