"""PrefixEncoder against the text encoder called by hand, and what must hold of any backbone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.samples import DataError, Sample, check_picklable

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
ANSWERS = ["red", "a blue box", "left"]


class Frames:
    """A video of fixed noise."""

    num_frames, fps = 8, 4.0

    def __init__(self, seed):
        self.seed = seed

    def frames(self, indices):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)[list(indices)]


def make(**options):
    encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2)
    backbone = PrefixEncoder(frame_encoder=encoder, num_frames=3, pretrained=False, text_config=TINY, **options)
    backbone.set_answers(ANSWERS)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return make()


def samples(*questions):
    return [Sample(id=str(i), domain="d", question=q, video=Frames(i)) for i, q in enumerate(questions)]


@pytest.mark.parametrize("use_time", [True, False])
def test_logits_are_those_of_the_text_encoder_by_hand(use_time):
    backbone = make(use_time=use_time)
    batch = backbone.collator("test")(samples("What is it?", "Which way does the red box move?"))
    with torch.no_grad():
        out = backbone(dict(batch))
        for row in range(2):
            video = backbone.frame_encoder(batch["pixels"][row]).flatten(0, 1)  # (F * P, N)
            x = F.layer_norm(video, video.shape[-1:])
            if use_time:
                time = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(4)
                x = torch.cat([x, time[:, None] * x], -1)
            tokens = x @ backbone.video_projection.weight.T + backbone.video_projection.bias
            length = int(batch["attention_mask"][row].sum())
            words = backbone.text.embeddings.word_embeddings(batch["input_ids"][row, :length])
            states = backbone.text(inputs_embeds=torch.cat([tokens, words])[None], output_hidden_states=True)
            state = F.normalize(states.last_hidden_state[0].mean(0), dim=0)
            expected = state @ backbone.answer_embeddings.T / backbone.temperature
            torch.testing.assert_close(out.logits[row], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out.routing[0][row], video.mean(0), rtol=1e-4, atol=1e-4)
            routed = states.hidden_states[backbone.routing_layer][0].mean(0)
            torch.testing.assert_close(out.routing[1][row], routed, rtol=1e-4, atol=1e-4)
    assert tuple(p.shape[1] for p in out.routing) == backbone.routing_widths


def test_stored_features_give_what_the_frames_give(backbone):
    plain = samples("What is it?", "Where is it?")
    collate = backbone.collator("test")
    pixels = collate(plain)
    with torch.no_grad():
        tokens = backbone.frame_encoder(pixels["pixels"].flatten(0, 1)).unflatten(0, (2, 3))
        name = backbone.frame_encoder.name
        stored = collate([replace(s, features={name: t}) for s, t in zip(plain, tokens)])
        assert "pixels" not in stored
        torch.testing.assert_close(backbone(stored).logits, backbone(pixels).logits)


def test_a_sample_does_not_depend_on_its_batch_or_padding(backbone):
    collate = backbone.collator("test")
    first, second = samples("What is it?", "Which of the two boxes moves to the left side of the picture?")
    with torch.no_grad():
        alone = backbone(collate([first])).logits
        beside = backbone(collate([second, first])).logits[1:]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)


def test_the_order_of_frames_changes_the_answer_scores_only_with_time_or_positions(backbone):
    batch = backbone.collator("test")(samples("What is it?"))
    turned = {**batch, "pixels": batch["pixels"].flip(1)}
    with torch.no_grad():
        assert not torch.allclose(backbone(dict(batch)).logits, backbone(turned).logits, atol=1e-4)


def test_answers_are_mean_pooled_embeddings_of_the_text(backbone):
    with torch.no_grad():
        text = backbone.tokenizer("a blue box", return_tensors="pt")
        expected = F.normalize(backbone.text(**text).last_hidden_state[0].mean(0), dim=0)
    torch.testing.assert_close(backbone.answer_embeddings[1], expected, rtol=1e-4, atol=1e-5)


def test_frozen_and_in_evaluation_mode_unless_official_dropout_is_asked_for(backbone):
    backbone.train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())
    official = make(train_dropout="official")
    official.train()
    assert official.text.training
    assert not any(m.training for m in official.frame_encoder.modules())


def test_fingerprint_follows_the_weights(backbone):
    other = copy.deepcopy(backbone)
    assert other.fingerprint == backbone.fingerprint
    with torch.no_grad():
        other.video_projection.weight[0, 0] += 1
    assert other.fingerprint != backbone.fingerprint
    assert make(projection_seed=1).fingerprint != backbone.fingerprint


def test_question_alone_needs_no_video():
    alone = PrefixEncoder(pretrained=False, text_config=TINY)
    alone.set_answers(ANSWERS)
    collate = alone.collator("test")
    assert collate.needs == ("question",)
    batch = collate([Sample(id="a", domain="d", question="What is it?")])
    assert alone(batch).logits.shape == (1, 3)
    assert alone.feature_extractor() is None


def test_collator_travels_to_workers(backbone):
    check_picklable(backbone.collator("fit"))


def test_a_long_question_names_the_sample_and_the_option(backbone):
    with pytest.raises(DataError, match=r"'0' has \d+ tokens; backbone.init_args.max_tokens allows 64"):
        backbone.collator("fit")(samples("word " * 80))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_frames": 0}, "num_frames=0"), ({"pretrained": True, "text_config": TINY}, "pretrained: false")],
)
def test_settings_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(**{"pretrained": False, **options})
