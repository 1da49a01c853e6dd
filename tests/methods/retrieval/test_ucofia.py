import math

import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.methods.retrieval.ucofia import Ucofia

WIDTH, FRAMES, WORDS, TOKENS = 12, 3, 4, 8
FACTS = TowerFacts(WIDTH, 2, math.log(20.0))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(scramble=True, **options):
    head = Ucofia(**{"max_frames": FRAMES, "max_words": WORDS, "temporal": "mean", "samples": 30} | options)
    head.build(FACTS)
    if scramble:
        with torch.no_grad():
            for place, parameter in enumerate(head.parameters()):
                parameter += 0.2 * numbers(*parameter.shape, seed=place)
    return head.eval()


def tokens(texts=2, videos=3, frames=FRAMES, words=WORDS, real=(FRAMES, 2, 1)):
    mask = torch.arange(words) < torch.tensor([words, 2])[:texts, None]
    return (
        TextTokens(numbers(texts, WIDTH, seed=50), numbers(texts, words, WIDTH, seed=51), mask),
        VideoTokens(
            numbers(videos, frames, TOKENS, WIDTH, seed=52), torch.arange(frames) < torch.tensor(real)[:, None]
        ),
    )


@torch.no_grad()
def score(head, texts, videos):
    return head.similarity(head.embed_text(texts), head.embed_video(videos))


def norm(x):
    return x / math.sqrt(sum(float(v) ** 2 for v in x))


@pytest.mark.parametrize("masked", [False, True])
def test_the_levels_are_those_of_the_equations(isa_of_a_list, masked):
    head, (texts, videos) = built(mask_padding=masked).requires_grad_(False), tokens()
    found, scale = score(head, texts, videos), math.exp(head.logit_scale.item())
    with torch.no_grad():
        selected = head.patch_selector(videos.tokens, mask=videos.mask if masked else None).unflatten(1, (FRAMES, -1))
    for t in range(2):
        for v in range(3):
            real, kept = videos.mask[v], texts.mask[t] if masked else torch.ones(WORDS, dtype=torch.bool)
            frames = [norm(frame) for frame in videos.tokens[v, :, 0]]
            sentence = norm(texts.sentence[t])
            video = norm(sum(frame for frame, there in zip(frames, real) if there))
            coarse = scale * (sentence @ head.sentence_projection) @ (video @ head.video_projection)
            of_frames = [sentence @ frame for frame in frames]
            seen = real if masked else None
            middle = scale * isa_of_a_list(of_frames, head.frame_matrix.weight, 0.01, seen)
            patches = [patch @ head.patch_projection for frame in selected[v] for patch in frame]
            there = [bool(f) for f in real for _ in range(4)] if masked else None
            words = [norm(word) @ head.word_projection for word in texts.words[t]]
            table = torch.tensor([[float(word @ patch) for patch in patches] for word in words])
            by_patch = [isa_of_a_list(column, head.word_matrix.weight, 0.01, kept) for column in table.T]
            by_word = [isa_of_a_list(row, head.patch_matrix.weight, 0.01, there) for row in table]
            fine = isa_of_a_list(by_patch, head.patch_matrix_2.weight, 0.01, there)
            fine = (fine + isa_of_a_list(by_word, head.word_matrix_2.weight, 0.01, kept)) / 2
            expected = torch.tensor([float(coarse), middle, fine])
            torch.testing.assert_close(found[:, t, v], expected, atol=2e-4, rtol=1e-4)


def test_at_the_start_the_coarse_level_is_the_scaled_cosine():
    head, (texts, videos) = built(scramble=False), tokens(real=(FRAMES, FRAMES, FRAMES))
    frames = nn.functional.normalize(videos.tokens[:, :, 0], dim=-1)
    cosines = nn.functional.cosine_similarity(texts.sentence[:, None], frames.mean(1)[None], dim=-1)
    torch.testing.assert_close(score(head, texts, videos)[0], 20 * cosines, atol=1e-5, rtol=1e-5)


def test_one_frame_makes_the_second_level_its_cosine():
    head, (texts, videos) = built(), tokens(frames=1, real=(1, 1, 1))
    cosines = nn.functional.cosine_similarity(texts.sentence[:, None], videos.tokens[None, :, 0, 0], dim=-1)
    expected = head.logit_scale.exp() * cosines
    torch.testing.assert_close(score(head, texts, videos)[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", ["full", "relative"])
@pytest.mark.parametrize("selector", ["video", "frame"])
def test_masked_padding_has_no_part_in_the_score(isa, selector):
    head, (texts, videos) = built(mask_padding=True, isa=isa, selector=selector), tokens(real=(2, 2, 2))
    texts = TextTokens(texts.sentence, texts.words, torch.tensor([[True, True, False, False]]).expand(2, -1))
    cut = TextTokens(texts.sentence, texts.words[:, :2], texts.mask[:, :2])
    shorter = VideoTokens(videos.tokens[:, :2], videos.mask[:, :2])
    torch.testing.assert_close(score(head, texts, videos), score(head, cut, shorter), atol=1e-5, rtol=1e-5)
    unmasked = built(isa=isa, selector=selector)
    assert not torch.allclose(score(unmasked, texts, videos)[1:], score(unmasked, cut, shorter)[1:], atol=1e-3)


def test_a_relative_matrix_compares_longer_videos_and_texts():
    head = built(isa="relative", scramble=False)
    texts, videos = tokens(frames=7, words=9, real=(7, 7, 7))
    longer = built(isa="relative", scramble=False, max_frames=7, max_words=9)
    longer.load_state_dict(longer.state_dict() | {"patch_selector.norm.weight": head.patch_selector.norm.weight})
    torch.testing.assert_close(score(head, texts, videos), score(longer, texts, videos))


def test_perturbed_evaluation_is_that_of_one_seed():
    videos = tokens()[1]
    hard, perturbed = built(), built(evaluate_by="perturbed", sigma=0.5)
    with torch.no_grad():
        found, expected = perturbed.embed_video(videos).patches, perturbed.embed_video(videos, [0, 0, 0]).patches
        assert torch.equal(found, expected)
        assert not torch.allclose(found, hard.embed_video(videos).patches)
        exact = built(evaluate_by="perturbed", sigma=0.0).embed_video(videos).patches
        assert torch.allclose(exact, hard.embed_video(videos).patches)


def test_without_its_matrix_patches_are_compared_as_they_are():
    videos, head = tokens()[1], built(visual_local_matrix=False)
    assert not hasattr(head, "patch_projection")
    assert torch.equal(head.embed_video(videos).patches, head.patch_selector(videos.tokens))


@pytest.mark.parametrize("levels", [["patch_word"], ["video_sentence", "word"], ["video_sentence"] * 2, []])
def test_levels_that_make_no_head_are_refused(levels):
    with pytest.raises(ValueError, match=r"levels=.*must be video_sentence and any of"):
        Ucofia(levels=levels)
