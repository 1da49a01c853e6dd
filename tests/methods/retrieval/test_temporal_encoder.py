import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.methods.retrieval.pooling import mean_direction, unit
from fulgurite.methods.retrieval.temporal_encoder import TemporalEncoder, encoder_from_text

WIDTH, HEADS, FRAMES = 16, 2, 5


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoder(layers=2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = TemporalEncoder(WIDTH, HEADS, layers, FRAMES)
        for parameter in made.parameters():  # norms and biases too
            nn.init.normal_(parameter, std=0.3)
    return made


def by_torch(own, frames, mask):
    """The same by torch's own encoder layers, which leave missing frames out altogether."""
    x = frames + own.positions[: frames.shape[1]]
    for block in own.blocks:
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            4 * WIDTH,
            dropout=0,
            activation=lambda x: x * torch.sigmoid(1.702 * x),
            layer_norm_eps=1e-12,
            batch_first=True,
            norm_first=True,
            dtype=own.positions.dtype,
        )
        parts = {"self_attn": block.attn, "linear1": block.mlp.c_fc, "linear2": block.mlp.c_proj}
        for name, part in (parts | {"norm1": block.ln_1, "norm2": block.ln_2}).items():
            layer.get_submodule(name).load_state_dict(part.state_dict())
        x = layer(x, src_key_padding_mask=~mask)
    return x + frames


def text_tower(layers=3, positions=7, width=WIDTH):
    """Names and shapes of CLIP's tower for text."""
    blocks = TemporalEncoder(width, HEADS, layers, positions).blocks.state_dict()
    shapes = {f"transformer.resblocks.{name}": tensor.shape for name, tensor in blocks.items()}
    shapes["positional_embedding"] = (positions, width)
    return {name: numbers(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}


def facts(blocks=None):
    return TowerFacts(WIDTH, HEADS, 4.6, blocks or {})


def test_it_computes_what_torchs_layers_do():
    own, frames = encoder(), numbers(3, FRAMES, WIDTH)
    mask = torch.arange(FRAMES) < torch.tensor([[5], [3], [1]])
    with torch.no_grad():
        found, expected = own(frames, mask), by_torch(own.double(), frames.double(), mask)
    torch.testing.assert_close(found[mask].double(), expected[mask], atol=1e-5, rtol=1e-5)


def test_missing_frames_change_nothing():
    own, frames = encoder(), numbers(1, FRAMES, WIDTH)
    mask = torch.tensor([[True, True, True, False, False]])
    other = torch.where(mask[..., None], frames, 100 * numbers(1, FRAMES, WIDTH, seed=1))
    assert torch.equal(own(frames, mask)[mask], own(other, mask)[mask])
    alone = own(frames[:, :3], mask[:, :3])
    torch.testing.assert_close(own(frames, mask)[:, :3], alone, atol=1e-6, rtol=1e-5)


def test_it_starts_as_the_first_blocks_of_the_tower_for_text():
    blocks = text_tower()
    made = encoder_from_text(facts(blocks), layers=2, max_frames=4).state_dict()
    assert torch.equal(made.pop("positions"), blocks["positional_embedding"])
    assert {name.split(".")[1] for name in made} == {"0", "1"}
    assert all(torch.equal(blocks[f"transformer.res{name}"], tensor) for name, tensor in made.items())


def test_without_a_tower_to_start_from_it_has_clips_deviations():
    made = TemporalEncoder(64, 4, 2, 200)
    block = made.blocks[1]
    expected = {
        made.positions: 0.01,
        block.attn.in_proj_weight: 64**-0.5,
        block.attn.out_proj.weight: 64**-0.5 / 2,
        block.mlp.c_fc.weight: 128**-0.5,
        block.mlp.c_proj.weight: 64**-0.5 / 2,
    }
    assert all(weight.std().item() == pytest.approx(std, rel=0.1) for weight, std in expected.items())
    assert len(encoder_from_text(facts(), 2, 9).positions) == 9


@pytest.mark.parametrize(
    ("change", "layers", "frames", "message"),
    [
        ({}, 4, 4, "temporal_layers=4.*3 blocks"),
        ({}, 2, 8, "max_frames=8.*7 positions"),
        ({"transformer.resblocks.1.ls_1.gamma": torch.ones(WIDTH)}, 2, 4, r"ls_1.gamma \(16,\) for None"),
        ({"transformer.resblocks.0.ln_1.weight": torch.ones(9)}, 2, 4, r"ln_1.weight \(9,\) for \(16,\)"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(change, layers, frames, message):
    with pytest.raises(ValueError, match=message):
        encoder_from_text(facts(text_tower() | change), layers, frames)


def test_more_frames_than_positions_are_refused():
    with pytest.raises(ValueError, match=r"6 frames.*5 positions"):
        encoder()(numbers(1, 6, WIDTH), torch.ones(1, 6, dtype=torch.bool))


def test_the_mean_direction_leaves_missing_frames_out():
    frames, mask = numbers(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    first = frames[0, :2] / frames[0, :2].norm(dim=1, keepdim=True)
    expected = first.mean(0) / first.mean(0).norm()
    torch.testing.assert_close(mean_direction(frames, mask)[0], expected)
    zero = torch.zeros(3, requires_grad=True)
    unit(zero).sum().backward()
    assert torch.equal(unit(zero), zero)
    assert zero.grad.isfinite().all()
