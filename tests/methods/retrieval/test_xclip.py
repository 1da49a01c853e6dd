import math

import pytest
import torch
from torch import nn

from fulgurite.methods.retrieval.features import TextTokens, VideoTokens
from fulgurite.methods.retrieval.head import TowerFacts
from fulgurite.methods.retrieval.xclip import XClip, attended

WIDTH, FRAMES, WORDS = 12, 3, 4


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_attention(x, matrix, kept):
    """A(x; M) of one list of numbers, of which ``kept`` count."""
    counted = [j for j in range(len(x)) if kept[j]]
    exponentials = {j: math.exp((x[j] - max(x)) / 0.01) for j in counted}
    share = {j: e / sum(exponentials.values()) for j, e in exponentials.items()}
    return sum(sum(share[i] * float(matrix[i, j]) for i in counted) * x[j] for j in counted)


@pytest.mark.parametrize("masked", [False, True])
def test_the_levels_are_those_of_the_equations(masked):
    head = XClip(FRAMES + 1, WORDS + 2, temporal="mean", mask_padding=masked)
    head.build(TowerFacts(WIDTH, 2, 3.0))
    head.double()
    with torch.no_grad():
        for place, parameter in enumerate(head.parameters()):
            parameter += 0.3 * numbers(*parameter.shape, seed=place)
    word_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    frame_mask = torch.tensor([[True] * 3, [True, True, False]])
    texts = TextTokens(numbers(2, WIDTH, seed=50), numbers(2, WORDS, WIDTH, seed=51), word_mask)
    videos = VideoTokens(numbers(2, FRAMES, 1, WIDTH, seed=52), frame_mask)
    with torch.no_grad():
        found = head.similarity(head.embed_text(texts), head.embed_video(videos))
    unit, scale = lambda x: x / x.norm(), math.exp(head.logit_scale.item())
    for t in range(2):
        for v in range(2):
            kept = word_mask[t] if masked else [True] * WORDS
            seen = frame_mask[v] if masked else [True] * FRAMES
            sentence, words = unit(texts.sentence[t]), [unit(word) for word in texts.words[t]]
            frames = [unit(frame) for frame in videos.tokens[v, :, 0]]
            video = unit(sum(frame for frame, there in zip(frames, frame_mask[v]) if there))
            table = [[float(word @ head.word_projection @ frame) for frame in frames] for word in words]
            columns = [[row[f] for row in table] for f in range(FRAMES)]
            by_frame = [plain_attention(column, head.word_matrix, kept) for column in columns]
            by_word = [plain_attention(row, head.frame_matrix, seen) for row in table]
            both = plain_attention(by_frame, head.frame_matrix_2, seen)
            both += plain_attention(by_word, head.word_matrix_2, kept)
            expected = [
                float(sentence @ head.sentence_projection @ video),
                plain_attention([float(word @ video) for word in words], head.video_word_matrix, kept),
                plain_attention([float(sentence @ frame) for frame in frames], head.frame_sentence_matrix, seen),
                both / 2,
            ]
            torch.testing.assert_close(found[:, t, v], scale * torch.tensor(expected, dtype=torch.float64))


def test_identity_matrices_weigh_by_one_softmax():
    x = 0.1 * numbers(3, 4)
    expected = ((x / 0.01).softmax(-1) * x).sum(-1)
    torch.testing.assert_close(attended(x, torch.eye(6, dtype=torch.float64)), expected)


def test_tiles_change_neither_scores_nor_gradients(monkeypatch):
    from fulgurite.methods.retrieval import tiles

    found = []
    for entries in (tiles.CACHE_ENTRIES, 24):
        monkeypatch.setattr(tiles, "CACHE_ENTRIES", entries)
        head = XClip(FRAMES, WORDS, temporal="mean")
        head.build(TowerFacts(WIDTH, 2, 3.0))
        head.double()
        texts = TextTokens(numbers(5, WIDTH, seed=1), numbers(5, WORDS, WIDTH, seed=2), torch.ones(5, WORDS) > 0)
        videos = VideoTokens(numbers(6, FRAMES, 1, WIDTH, seed=3), torch.ones(6, FRAMES) > 0)
        scores = head.similarity(head.embed_text(texts), head.embed_video(videos))
        (scores * numbers(*scores.shape, seed=4)).sum().backward()
        found.append((scores.detach(), nn.utils.parameters_to_vector(p.grad for p in head.parameters())))
    torch.testing.assert_close(*found)
