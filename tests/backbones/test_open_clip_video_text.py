"""Tokens of several kinds of towers against open_clip's own features, and what must hold of any of them."""

import copy

import open_clip
import pytest
import torch
from torch.nn import functional as F

from fulgurite.backbones.frame_pixels import StoredPixels
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.retrieval.patch_shift import shift_patches
from fulgurite.samples import Sample

CAPTIONS = ("a dog runs", "two cats sit on a mat and sleep")
OWN = ("attention_output", "feed_forward_input", "feed_forward_output")


class Frames:
    """A video of fixed noise."""

    fps, seconds, num_frames = 4.0, None, 8

    def __init__(self, name, num_frames=8):
        self.name, self.num_frames = name, num_frames

    def frames(self, indices):
        generator = torch.Generator().manual_seed(ord(self.name))
        noise = torch.randint(256, (self.num_frames, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return noise[list(indices)]


def samples(*frames):
    return [
        Sample(name, "d", task="retrieval", captions=CAPTIONS[: 1 + number], video=Frames(name, count))
        for number, (name, count) in enumerate(zip("ab", frames or (8, 8)))
    ]


def run(backbone, batch=None):
    """Words, captions and frames of a batch, one after the other."""
    batch = batch or backbone.collator("fit")(samples())
    text, video = backbone.text_tokens(batch), backbone.video_tokens(batch)
    return text.words, text.sentence, video.tokens


def plain(backbone, config):
    """open_clip's own model with the same weights, built apart."""
    custom = hasattr(backbone.model, "text")
    if hasattr(backbone.text_tower, "pooler"):
        return copy.deepcopy(backbone.model)
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments).eval()
    if hasattr(model.visual, "trunk"):
        model.visual.set_input_size((64, 64))
    model.load_state_dict(backbone.model.state_dict())
    return model


@torch.no_grad()
def test_captions_and_frames_are_open_clips_own_features(make, kind, config_of):
    backbone = make(kind)
    batch = backbone.collator("fit")(samples())
    words, sentence, tokens = run(backbone, batch)
    reference = plain(backbone, config_of(kind))
    assert words.shape == (3, 16, 32)
    assert tokens.shape[:2] == (2, 2)
    torch.testing.assert_close(sentence, reference.encode_text(batch["text"]), rtol=1e-4, atol=1e-5)
    frames = reference.encode_image(batch["pixels"].flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(tokens[:, :, 0], frames, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_of_clip_are_all_of_the_last_block_projected(make, config_of):
    backbone = make("clip")
    batch = backbone.collator("fit")(samples())
    words, _, tokens = run(backbone, batch)
    reference = plain(backbone, config_of("clip"))
    reference.visual.output_tokens = True
    _, patches = reference.visual(batch["pixels"].flatten(0, 1))
    assert tokens.shape == (2, 2, 17, 32)
    torch.testing.assert_close(tokens[:, :, 1:].flatten(0, 1), patches @ reference.visual.proj, rtol=1e-4, atol=1e-5)
    last = reference.forward_intermediates(text=batch["text"], normalize_intermediates=True)["text_intermediates"][-1]
    torch.testing.assert_close(words, last @ reference.text_projection, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cells_of_timm_go_through_the_head_one_by_one(make):
    backbone = make("timm_convolutions", grid=2)
    pixels = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    visual = backbone.model.visual
    found = visual.trunk.forward_features(pixels)  # (3, C, 4, 4)
    assert found.shape[-2:] == (4, 4)
    expected = torch.stack([found[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)], dim=1)
    tokens = backbone.picture_tokens.trunk(visual, pixels)
    torch.testing.assert_close(tokens[:, 1:], expected)
    weight = visual.head.proj.weight
    torch.testing.assert_close(backbone.picture_tokens.project(visual, tokens), tokens @ weight.T)

    vit = make("timm_vit_averaging")
    features = vit.model.visual.trunk.forward_features(pixels[..., :64, :64])
    torch.testing.assert_close(
        vit.picture_tokens.trunk(vit.model.visual, pixels[..., :64, :64])[:, 1:],
        vit.model.visual.trunk.fc_norm(features[:, 1:]),
    )


@torch.no_grad()
def test_words_of_a_hugging_face_tower_are_its_states_projected(make):
    backbone = make("timm_convolutions")
    batch = backbone.collator("fit")(samples())
    words, sentence, _ = run(backbone, batch)
    tower, mask = backbone.model.text, batch["text_mask"]
    states = tower.transformer(input_ids=batch["text"], attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(words, tower.proj(states))
    mean = torch.stack([row[real].mean(0) for row, real in zip(states, mask)])
    torch.testing.assert_close(sentence, tower.proj(mean), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_changes_no_caption_and_no_real_word(make, kind):
    if kind == "whole_context":
        with pytest.raises(ValueError, match=r"reads padding.*set max_words=16 and pad_to=max_words"):
            make(kind, pad_to="longest")
        return
    backbone, tight = make(kind), make(kind, pad_to="longest")
    batch = tight.collator("fit")(samples())
    assert batch["text"].shape[1] < 16
    words, sentence, _ = run(backbone)
    fewer, same, _ = run(tight, batch)
    torch.testing.assert_close(same, sentence, rtol=1e-4, atol=1e-5)
    mask = batch["text_mask"]
    torch.testing.assert_close(fewer[mask], words[:, : mask.shape[1]][mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fewer_words_than_the_context_are_its_beginning(make):
    words, sentence, _ = run(make("clip"))
    fewer, same, _ = run(make("clip", max_words=12))
    torch.testing.assert_close(same, sentence)
    torch.testing.assert_close(fewer, words[:, :12])
    cut = make("clip", max_words=5, long_captions="cut").collator("fit")(samples())
    assert cut["text"].shape == (3, 5)
    assert cut["cut"].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip", {f"{tower}{point}" for tower in ("", "vision_", "text_") for point in OWN}),
        ("other_attention", {f"{tower}{point}" for tower in ("", "vision_", "text_") for point in OWN}),
        ("averaging", {f"{t}{p}" for t in ("", "vision_", "text_") for p in OWN} | {"text_projection"}),
        ("timm_vit", {f"{t}{p}" for t in ("", "vision_", "text_") for p in OWN} | {"vision_projection"}),
        (
            "timm_convolutions",
            {
                f"{tower}{point}"
                for tower in ("", "text_")
                for point in (*OWN, "query", "key", "value", "attention_norm", "feed_forward_norm")
            }
            | {"vision_projection", "text_projection"},
        ),
    ],
)
def test_every_point_acts_on_its_own_tower(make, kind, expected):
    backbone = make(kind)
    assert set(backbone.spec.points) == expected
    batch = backbone.collator("fit")(samples())
    with torch.no_grad():
        before = run(backbone, batch)
    for point in sorted(expected):
        adapted = copy.deepcopy(backbone)
        adapter = Bottleneck if "norm" in point else LoRA
        bank = AdapterBank(adapted, [Placement([point], adapter)])
        for each in bank.adapters_of("live").values():
            torch.nn.init.normal_(each.up.weight, generator=torch.Generator().manual_seed(1))
        assert len(bank.sites) == backbone.spec.points[point][1]
        found = [not torch.allclose(new, old) for new, old in zip(run(adapted, batch), before)]
        vision, text = not point.startswith("text_"), not point.startswith("vision_")
        if kind == "timm_convolutions" and not point.startswith("vision_"):
            vision = False  # convolutions have no such places
        assert found == [text, text, vision], point
        sum(x.square().sum() for x in run(adapted, batch)).backward()
        assert all(p.grad is not None and p.grad.any() for p in bank.parameters_of("live")), point


def test_fresh_adapters_at_every_layer_change_nothing(make):
    backbone = make("clip")
    with torch.no_grad():
        before = run(backbone)
        bank = AdapterBank(backbone, [Placement(["attention_output", "feed_forward_output"], Bottleneck)])
        assert len(bank.sites) == 8
        assert all(torch.equal(new, old) for new, old in zip(run(backbone), before))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "timm_vit"])
def test_patches_shift_where_the_option_says(make, kind):
    still, shifted = make(kind), make(kind, patch_shift=[1])
    assert shifted.state_dict().keys() == still.state_dict().keys()
    batch = still.collator("fit")(samples())
    expected = copy.deepcopy(still)
    tower = expected.model.visual
    norm = tower.trunk.blocks[1].norm1 if kind == "timm_vit" else tower.transformer.resblocks[1].ln_1
    norm.register_forward_hook(lambda module, args, output: shift_patches(output, 2))
    assert torch.equal(run(shifted, batch)[2], run(expected, batch)[2])
    assert not torch.allclose(run(shifted, batch)[2], run(still, batch)[2])
    assert torch.equal(run(shifted, batch)[1], run(still, batch)[1])
    alone = {**batch, "pixels": batch["pixels"][:, :1], "frame_mask": batch["frame_mask"][:, :1]}
    torch.testing.assert_close(run(shifted, alone)[2], run(still, alone)[2])
    turned = {**batch, "pixels": batch["pixels"].flip(0)}
    torch.testing.assert_close(run(shifted, turned)[2].flip(0), run(shifted, batch)[2])
    copied = copy.deepcopy(shifted)
    assert torch.equal(run(copied, batch)[2], run(shifted, batch)[2])


def test_all_but_the_published_parameters_train(make, kind):
    backbone = make(kind)
    backbone.unfreeze()
    still = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    if kind == "clip":
        inside = ("positional_embedding", "class_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
        visual = {f"model.visual.{name}" for name in inside}
        text = {f"model.{name}" for name in ("token_embedding.weight", "positional_embedding", "logit_scale")}
        assert still == visual | text
    words, _, tokens = run(backbone)
    (words.square().sum() + tokens.square().sum() + run(backbone)[1].square().sum()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == (name not in still), name
    with pytest.raises(LookupError, match="no_such"):
        backbone.unfreeze(["no_such"])


def test_training_mode_reaches_towers_that_train_but_no_running_statistics(make):
    off = make("timm_convolutions")
    off.unfreeze()
    assert not any(part.training for part in off.train().modules())
    backbone = make("timm_convolutions", train_dropout="official")
    trunk, dropout = backbone.model.visual.trunk, backbone.model.text.transformer.embeddings.dropout
    backbone.unfreeze()
    backbone.train()
    assert dropout.training
    assert trunk.training
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    assert not torch.equal(run(backbone)[0], run(backbone)[0])
    assert torch.equal(run(backbone)[2], run(backbone)[2])
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert torch.equal(run(backbone.eval())[0], run(backbone)[0])
    asked = make("timm_convolutions", train_dropout="official").train()
    assert asked.model.text.transformer.embeddings.dropout.training


@torch.no_grad()
def test_stored_tokens_give_what_the_frames_give(make, kind):
    backbone = make(kind, num_frames=3, frame_rule="official_dam")
    plain_samples = samples(8, 2)
    collate = backbone.collator("fit")
    batch = collate(plain_samples)
    assert not batch["frame_mask"].all()
    extractor = backbone.feature_extractor()
    encoder, stored = extractor.encoder, []
    for sample in plain_samples:
        frames = sample.video.frames(extractor.sampling.indices(sample.video))
        tokens = encoder(encoder.transform(frames))
        stored.append(Sample(sample.id, "d", captions=sample.captions, features={encoder.name: tokens}))
    held = collate(stored)
    assert "pixels" not in held
    torch.testing.assert_close(run(backbone, held)[2], run(backbone, batch)[2], rtol=1e-4, atol=1e-5)


def test_tokens_are_stored_only_where_the_trunk_stays_as_it_is(make):
    assert make("clip").trunk_is_fixed
    for options in ({"patch_shift": [0]}, {}):
        changing = make("clip", **options)
        if not options:
            changing.unfreeze()
        assert not changing.trunk_is_fixed
        assert isinstance(changing.feature_extractor().encoder, StoredPixels)
    adapted = make("timm_vit")
    AdapterBank(adapted, [Placement(["vision_projection", "text_attention_output"], LoRA)])
    assert not isinstance(adapted.feature_extractor().encoder, StoredPixels)
    batch = adapted.collator("fit")(samples())
    batch["tokens"] = adapted.feature_extractor().encoder(batch.pop("pixels").flatten(0, 1)).unflatten(0, (2, 2))
    AdapterBank(adapted, [Placement(["vision_attention_output"], LoRA)])
    assert isinstance(adapted.feature_extractor().encoder, StoredPixels)
    with pytest.raises(ValueError, match="stored tokens of frames"):
        adapted.video_tokens(batch)


def test_stored_frames_are_those_read_anew_to_half_a_level(make):
    backbone = make("clip", num_frames=3, frame_rule="official_dam")
    backbone.unfreeze()
    collate, extractor = backbone.collator("fit"), backbone.feature_extractor()
    plain_samples, stored = samples(8, 2), []
    for sample in plain_samples:
        frames = sample.video.frames(extractor.sampling.indices(sample.video))
        kept = extractor.encoder(extractor.encoder.transform(frames))
        assert kept.dtype == torch.uint8
        features = {extractor.encoder.name: kept}
        stored.append(Sample(sample.id, "d", captions=sample.captions, features=features))
    held, batch = collate(stored), collate(plain_samples)
    assert torch.equal(held["frame_mask"], batch["frame_mask"])
    torch.testing.assert_close(held["pixels"], batch["pixels"])  # these frames have the tower's size already
    other = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    level = 1 / 255 / min(backbone.transform.std)
    again = backbone.transform.normalised(extractor.encoder.transform(other))
    assert 0 < (again - backbone.transform(other)).abs().max() <= 0.5 * level + 1e-5


def test_stored_tokens_are_known_by_trunk_and_preparation(make):
    digests = {
        name: make("clip", **options).feature_extractor().encoder.fingerprint
        for name, options in {
            "one": {},
            "same": {},
            "grid": {"grid": 2},
            "fit": {"fit": "stretch"},
            "w": {"seed": 1},
        }.items()
    }
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 4
    backbone = make("clip")
    with torch.no_grad():
        backbone.model.visual.proj.zero_()
    assert backbone.feature_extractor().encoder.fingerprint == digests["one"]


def test_facts_for_a_head(make, config_of):
    backbone = make("clip")
    facts = backbone.tower_facts()
    assert (facts.width, facts.heads) == (32, 2)
    assert facts.logit_scale == pytest.approx(float(backbone.model.logit_scale))
    expected = {
        name: tensor
        for name, tensor in open_clip.CLIP(**config_of("clip")).state_dict().items()
        if name.startswith("transformer.") or name == "positional_embedding"
    }
    assert {name: t.shape for name, t in facts.text_blocks.items()} == {n: t.shape for n, t in expected.items()}
    assert not make("timm_vit").tower_facts().text_blocks
    assert not make("timm_convolutions").tower_facts().text_blocks


def test_a_copy_is_a_model_of_its_own(make):
    backbone = make("clip")
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        copied.model.visual.proj.zero_()
        assert not run(copied)[2].any()
        assert run(backbone)[2].any()
    assert F.cosine_similarity(run(copied)[1], run(backbone)[1]).min() > 0.999
