"""What every head must hold, whatever it compares."""

import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.head import LARGEST_SCALE, TowerFacts
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.methods.retrieval.xclip import XClip

WIDTH, FRAMES, WORDS, TOKENS = 16, 3, 5, 10
FACTS = TowerFacts(WIDTH, 2, 3.0)
SIZES = {"max_frames": FRAMES, "max_words": WORDS, "temporal_layers": 2}
ALL_HEADS = {
    "ucofia": lambda **o: Ucofia(samples=40, **SIZES | o),
    "ucofia-frame": lambda **o: Ucofia(samples=40, selector="frame", evaluate_by="perturbed", **SIZES | o),
    "ucofia-relative": lambda **o: Ucofia(samples=40, isa="relative", mask_padding=True, **SIZES | o),
    "ucofia-coarse": lambda **o: Ucofia(levels=["video_sentence"], **SIZES | o),
    "ucofia-two": lambda **o: Ucofia(levels=["frame_sentence", "video_sentence"], temporal="mean", **SIZES | o),
    "ucofia-without-frames": lambda **o: Ucofia(levels=["video_sentence", "patch_word"], samples=40, **SIZES | o),
    "clip4clip": lambda **o: Clip4Clip(max_frames=FRAMES, **o),
    "clip4clip-transformer": lambda **o: Clip4Clip(FRAMES, "transformer", 2, **o),
    "xclip": lambda **o: XClip(**SIZES | o),
    "xclip-masked": lambda **o: XClip(mask_padding=True, temporal="mean", **SIZES | o),
}


@pytest.fixture(params=ALL_HEADS)
def make(request):
    """Builds the head anew, with weights away from their start."""

    def build(seed=0, **options):
        head = ALL_HEADS[request.param](**options)
        head.build(FACTS)
        with torch.no_grad():
            for place, parameter in enumerate(head.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + place))
                parameter += 0.1 * noise
        return head.eval()

    return build


def draw(texts=4, videos=4, frames=FRAMES, words=WORDS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_mask = torch.arange(words) < 2 + torch.arange(texts)[:, None] % (words - 1)
    video_mask = torch.arange(frames) < 1 + torch.arange(videos)[:, None] % frames
    return (
        TextTokens(
            torch.randn(texts, WIDTH, generator=generator),
            torch.randn(texts, words, WIDTH, generator=generator),
            text_mask,
        ),
        VideoTokens(torch.randn(videos, frames, TOKENS, WIDTH, generator=generator), video_mask),
    )


@torch.no_grad()
def score(head, texts, videos, levels=None):
    return head.similarity(head.embed_text(texts), head.embed_video(videos), levels)


def test_the_score_of_a_pair_depends_on_that_pair_alone(make):
    head, (texts, videos) = make(), draw()
    whole = score(head, texts, videos)
    assert whole.shape == (len(head.levels), 4, 4)
    assert whole.isfinite().all()
    rows, columns = torch.tensor([2, 0]), torch.tensor([3, 1, 0])
    part = score(head, texts[rows], videos[columns])
    torch.testing.assert_close(part, whole[:, rows][:, :, columns], atol=1e-5, rtol=1e-5)


def test_noise_belongs_to_the_video_and_not_to_its_place(make):
    head, (_, videos) = make().train(), draw()
    order = torch.tensor([2, 0, 3, 1])
    whole = head.embed_video(videos, [5, 6, 7, 8]).tensors()
    moved = head.embed_video(videos[order], [7, 5, 8, 6]).tensors()
    assert all(torch.allclose(moved[name], whole[name][order], atol=1e-5) for name in whole)


def test_evaluation_repeats_itself_and_survives_storage(make, tmp_path):
    head, (texts, videos) = make(), draw()
    first = score(head, texts, videos)
    assert torch.equal(first, score(head, texts, videos))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = make(seed=100)
    assert not torch.equal(first, score(other, texts, videos))
    other.load_state_dict(torch.load(tmp_path / "head.pt"))
    assert torch.equal(first, score(other, texts, videos))


def test_features_can_be_stored_and_put_together(make):
    head, (texts, videos) = make(), draw()
    with torch.no_grad():
        text, video = head.embed_text(texts), head.embed_video(videos)
    text = type(text).cat([text[:1], text[1:]])
    video = type(video).from_tensors(video.tensors())
    torch.testing.assert_close(head.similarity(text, video), score(head, texts, videos))


def test_levels_can_be_chosen_in_any_order(make):
    head, (texts, videos) = make(), draw()
    whole, names = score(head, texts, videos), head.levels[::-1]
    assert torch.equal(score(head, texts, videos, names), whole.flip(0))
    assert torch.equal(score(head, texts, videos, names[-1:]), whole[:1])
    with pytest.raises(ValueError, match=r"no levels \['patch'\]; it has"):
        score(head, texts, videos, ["patch"])


def test_gradients_reach_every_parameter(make):
    head, (texts, videos) = make().train(), draw()
    head.temperature = 1.0  # sharper softmaxes are so near one place that some gradients round to zero
    videos = VideoTokens(videos.tokens, torch.ones_like(videos.mask))
    scores = head.similarity(head.embed_text(texts), head.embed_video(videos, [1, 2, 3, 4]))
    scores.mean(0).diagonal().sum().backward()
    missing = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_shorter_texts_and_videos_are_compared_and_longer_ones_refused(make):
    head = make()
    assert score(head, *draw(frames=2, words=3)).isfinite().all()
    texts, videos = draw(frames=FRAMES + 1, words=WORDS + 1)
    with pytest.raises(ValueError, match=r"4 frames.*(set max_frames|temporal: mean)"):
        head.embed_video(videos)
    if len(head.levels) > 2 and getattr(head, "isa", "full") == "full":
        with pytest.raises(ValueError, match=r"6 words.*set max_words"):
            head.embed_text(texts)


def test_autocast_leaves_cosines_their_digits(make):
    head, (texts, videos) = make(), draw()
    with torch.autocast("cpu", torch.bfloat16):
        found = score(head, texts, videos)
    expected = score(head, texts, videos)
    fine = torch.tensor([level == "patch_word" for level in head.levels])
    assert torch.equal(found[~fine], expected[~fine])


def test_building_draws_no_random_numbers_of_others_and_depends_on_its_seed():
    states = []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        head = Ucofia(init_seed=seed, **SIZES)
        head.build(FACTS)
        assert torch.equal(before, torch.get_rng_state())
        states.append(nn.utils.parameters_to_vector(head.parameters()))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_scale_stays_within_its_limit(make):
    head = make()
    nn.init.constant_(head.logit_scale, 7.0)
    head.clamp()
    assert head.logit_scale.item() == pytest.approx(LARGEST_SCALE)
