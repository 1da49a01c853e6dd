"""Where the weights of dual encoders come from, and what is refused."""

import json

import open_clip
import pytest
import torch


def test_weights_come_from_files_and_folders(make, config_of, tmp_path):
    from safetensors.torch import save_file

    written = make("clip", seed=3)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(written.model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config_of("clip"), "preprocess_cfg": preprocess})
    )
    for options in (
        {"pretrained": str(folder / "open_clip_model.safetensors")},
        {"pretrained": str(folder), "model": str(folder)},
    ):
        read = make("clip", **options)
        assert read.fingerprint == written.fingerprint
    assert (read.transform.mean, read.transform.fit, read.transform.size) == ((0.1, 0.2, 0.3), "stretch", 32)
    assert read.source == str(folder)
    assert make("clip").transform.fit == "crop"


def test_weights_of_timm_fill_the_trunk(make, tmp_path):
    import timm

    torch.manual_seed(5)
    whole = timm.create_model("test_efficientnet")
    torch.save({f"renamed.{name}": tensor for name, tensor in whole.state_dict().items()}, tmp_path / "w.pth")
    backbone = make("timm_convolutions", vision_weights=str(tmp_path / "w.pth"))
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in backbone.model.visual.trunk.state_dict().items())
    assert backbone.transform.mean == tuple(whole.pretrained_cfg["mean"])


def test_random_weights_follow_the_seed_alone(make, kind):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = make(kind)
    assert torch.equal(torch.rand(1), expected)
    assert first.fingerprint == make(kind).fingerprint != make(kind, seed=1).fingerprint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "ViT-B-3"}, r"no model 'ViT-B-3'.*near: \['ViT-B"),
        ({"model": {"embed_dim": 32}}, r"custom lacks \['text_cfg', 'vision_cfg'\]"),
        ({"pretrained": "no_tag"}, "'no_tag' is no file or folder, and no weights of custom"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "another GELU than ViT-B-32 has: model: ViT-B-32-quickgelu"),
        ({"max_words": 17}, "max_words=17: the tower for text reads 3 to 16"),
        ({"grid": 0}, "grid=0 must be positive"),
        ({"patch_shift": [2]}, r"blocks \[2\], but there are 0 to 1"),
        ({"vision_weights": "w.pth"}, "none of its"),
        ({"num_frames": 0}, "count=0"),
    ],
)
def test_what_does_not_fit_is_refused(make, options, said, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: "nowhere")
    with pytest.raises(ValueError, match=said):
        make("clip", **options)


def test_towers_without_such_tokens_are_refused(make, config_of, tmp_path):
    for change in ({"attentional_pool": True}, {"timm_model_name": "test_efficientnet", "timm_pool": "rot_attn"}):
        broken = config_of("clip")
        broken["vision_cfg"] |= change
        with pytest.raises(ValueError, match=r"attention has no token|open_clip's own"):
            make("clip", model=broken)
    with pytest.raises(ValueError, match="no blocks of attention"):
        make("timm_convolutions", patch_shift=[0])
    without = config_of("averaging")
    without["text_cfg"] |= {"embed_cls": True}
    with pytest.raises(ValueError, match="embed_cls"):
        make("averaging", model=without)
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "b.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="should hold one file of weights"):
        make("clip", pretrained=str(tmp_path))
    backbone = make("clip", grid=9)
    with pytest.raises(ValueError, match=r"grid=9 cells per side, but the tower has \(4, 4\)"):
        backbone.picture_tokens.trunk(backbone.model.visual, torch.zeros(1, 3, 32, 32))
    state = make("clip").model.state_dict()
    state.pop("visual.proj")
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="does not hold the weights of custom"):
        make("clip", pretrained=str(tmp_path / "c.pth"))
