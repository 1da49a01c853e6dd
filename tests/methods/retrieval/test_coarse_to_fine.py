"""The three levels against loops over pairs, and what must hold whatever the tiles."""

import functools

import pytest
import torch

from fulgurite.methods.retrieval.coarse_to_fine import LEVELS, coarse_to_fine_similarity
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures

SCALE = 20.0


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def draw(texts=3, videos=4, words=5, frames=3, patches=6, width=8, masked=False, dtype=torch.float64):
    """Features, patches of norm about 3 among them, and the matrices of a head for longer ones."""
    text = TextFeatures(unit(texts, width, seed=0), unit(texts, words, width, seed=1))
    video = VideoFeatures(
        unit(videos, width, seed=2), unit(videos, frames, width, seed=3), normal(videos, patches, width, seed=4)
    )
    matrices = [
        torch.eye(size + 2, dtype=torch.float64) + 0.1 * normal(size + 2, size + 2, seed=5 + i)
        for i, size in enumerate((frames, words, words, patches, patches))
    ]
    text, video = text.map(lambda x: x.to(dtype)), video.map(lambda x: x.to(dtype))
    if masked:
        masks = [normal(*shape, seed=20) > -0.3 for shape in ((texts, words), (videos, frames), (videos, patches))]
        for mask in masks:
            mask[:, 0] = True
        text = TextFeatures(text.sentence, text.words, masks[0])
        video = VideoFeatures(video.video, video.frames, video.patches, masks[1], masks[2])
    return text, video, [m.to(dtype) for m in matrices]


def loop_over_pairs(isa, texts, videos, matrices, temperature):
    """(3, T, V) by the equations, number by number."""
    frame, word, word_2, patch, patch_2 = matrices
    scores = torch.zeros(3, len(texts), len(videos), dtype=torch.float64)
    for t in range(len(texts)):
        for v in range(len(videos)):
            kept_words = None if texts.word_mask is None else texts.word_mask[t]
            kept_frames = None if videos.frame_mask is None else videos.frame_mask[v]
            kept_patches = None if videos.patch_mask is None else videos.patch_mask[v]
            products = [[float(w @ p) for p in videos.patches[v]] for w in texts.words[t]]
            of_patches = [isa(column, word, temperature, kept_words) for column in zip(*products)]
            of_words = [isa(row, patch, temperature, kept_patches) for row in products]
            cosines = [float(texts.sentence[t] @ f) for f in videos.frames[v]]
            scores[0, t, v] = SCALE * float(texts.sentence[t] @ videos.video[v])
            scores[1, t, v] = SCALE * isa(cosines, frame, temperature, kept_frames)
            scores[2, t, v] = isa(of_patches, patch_2, temperature, kept_patches) / 2
            scores[2, t, v] += isa(of_words, word_2, temperature, kept_words) / 2
    return scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [1, 40])
def test_levels_equal_the_loop(isa_of_a_list, masked, spread):
    texts, videos, matrices = draw(masked=masked)
    matrices = [m * spread for m in matrices]
    found = coarse_to_fine_similarity(texts, videos, *matrices, SCALE, temperature=0.05)
    expected = loop_over_pairs(isa_of_a_list, texts, videos, matrices, 0.05)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", [0.0, 0.9, 1.5])
def test_float32_at_the_published_temperature(isa_of_a_list, column):
    texts, videos, matrices = draw(words=9, patches=12, width=32, masked=True)
    for matrix in matrices:
        matrix[:, 1] += column  # for the largest, weights are further apart than float32 holds
        matrix[1, 1] -= column
    expected = loop_over_pairs(isa_of_a_list, texts, videos, matrices, 0.01)
    texts, videos = texts.map(as_float), videos.map(as_float)
    found = coarse_to_fine_similarity(texts, videos, *map(as_float, matrices), SCALE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-4)  # 1e-6 in a product, 1e-4 in an exponent


def as_float(x):
    return x.float() if x.is_floating_point() else x


def test_levels_come_in_the_order_asked_for():
    texts, videos, matrices = draw()
    everything = coarse_to_fine_similarity(texts, videos, *matrices, SCALE)
    some = coarse_to_fine_similarity(texts, videos, *matrices, SCALE, levels=("patch_word", "video_sentence"))
    assert torch.equal(some, everything[[2, 0]])
    coarse = TextFeatures(texts.sentence), VideoFeatures(videos.video)
    assert torch.equal(coarse_to_fine_similarity(*coarse, *matrices, SCALE, levels=("video_sentence",)), everything[:1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [None, (1, 1), (2, 3), (5, 7), (100, 100)])
def test_a_pair_depends_on_neither_other_pairs_nor_tiles(masked, tile):
    texts, videos, matrices = draw(texts=5, videos=7, masked=masked, dtype=torch.float32)
    score = functools.partial(coarse_to_fine_similarity, texts, videos, *matrices, SCALE, temperature=0.05)
    scores = score()
    torch.testing.assert_close(score(tile=tile), scores, rtol=0, atol=1e-5)
    for t in range(5):
        for v in range(7):
            alone = coarse_to_fine_similarity(
                texts[t : t + 1], videos[v : v + 1], *matrices, SCALE, temperature=0.05, tile=tile
            )
            torch.testing.assert_close(alone[:, 0, 0], scores[:, t, v], rtol=0, atol=1e-5)


def test_many_tiles_of_the_default_size():
    texts, videos, matrices = draw(texts=19, videos=29, words=32, patches=48, width=16)
    scores = coarse_to_fine_similarity(texts, videos, *matrices, SCALE)
    picked = [0, 9, 18], [0, 14, 28]
    some = coarse_to_fine_similarity(texts[picked[0]], videos[picked[1]], *matrices, SCALE, tile=(1, 1))
    torch.testing.assert_close(scores[:, picked[0]][:, :, picked[1]], some, rtol=1e-8, atol=1e-8)


def test_swapped_roles_transpose():
    texts, videos, matrices = draw()
    scores = coarse_to_fine_similarity(texts, videos, *matrices, SCALE)
    frame, word, word_2, patch, patch_2 = matrices
    swapped = coarse_to_fine_similarity(
        TextFeatures(videos.video, videos.patches),
        VideoFeatures(texts.sentence, texts.words, texts.words),
        frame.new_ones(9, 9),
        patch,
        patch_2,
        word,
        word_2,
        SCALE,
    )
    torch.testing.assert_close(swapped[[0, 2]], scores[[0, 2]].mT, rtol=1e-9, atol=1e-9)


def test_one_frame_needs_no_aggregation():
    texts, videos, matrices = draw(frames=1)
    scores = coarse_to_fine_similarity(texts, videos, *matrices, SCALE, levels=("frame_sentence",))
    torch.testing.assert_close(scores[0], SCALE * texts.sentence @ videos.frames[:, 0].T, rtol=1e-12, atol=1e-12)


def gradients(score, tensors, weights):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad((score(*leaves) * weights).sum(), leaves)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_gradients_equal_those_without_tiles(masked, tile):
    texts, videos, matrices = draw(masked=masked)
    weights = normal(3, 3, 4, seed=9)
    tensors = [texts.sentence, texts.words, videos.video, videos.frames, videos.patches, *matrices, torch.tensor(SCALE)]

    def rebuild(s, w, v, f, p):
        return TextFeatures(s, w, texts.word_mask), VideoFeatures(v, f, p, videos.frame_mask, videos.patch_mask)

    def ours(*x):
        return coarse_to_fine_similarity(*rebuild(*x[:5]), *x[5:], temperature=0.3, tile=tile)

    def isa(x, matrix, mask):
        size = x.shape[-1]
        keep = torch.ones(size, dtype=torch.bool) if mask is None else mask
        first = torch.where(keep, (x / 0.3).exp(), 0)
        first = first / first.sum(-1, keepdim=True)
        second = torch.where(keep, (first @ matrix[:size, :size] / 0.3).exp(), 0)
        return (second * x).sum(-1) / second.sum(-1)

    def whole(*x):
        (s, w), (v, f, p) = x[:2], x[2:5]
        words = None if texts.word_mask is None else texts.word_mask[:, None]
        patches = None if videos.patch_mask is None else videos.patch_mask[None]
        products = torch.einsum("twd,vpd->twvp", w, p)
        of_patches = isa(products.movedim(1, 3), x[6], None if words is None else words[:, None])
        of_words = isa(products, x[8], None if patches is None else patches[None])
        fine = isa(of_patches, x[9], patches) + isa(of_words.mT, x[7], words)
        frames = isa(torch.einsum("td,vfd->tvf", s, f), x[5], videos.frame_mask)
        return torch.stack([x[10] * s @ v.T, x[10] * frames, fine / 2])

    torch.testing.assert_close(ours(*tensors), whole(*tensors), rtol=1e-10, atol=1e-10)
    for found, expected in zip(gradients(ours, tensors, weights), gradients(whole, tensors, weights)):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-8, atol=1e-10)


def test_gradients_of_some_inputs_only():
    texts, videos, matrices = draw()
    matrices[3].requires_grad_()
    coarse_to_fine_similarity(texts, videos, *matrices, SCALE, temperature=0.3).sum().backward()
    assert matrices[3].grad[:6, :6].abs().sum() > 0
    assert matrices[3].grad[6:].abs().sum() == 0
    assert all(m.grad is None for i, m in enumerate(matrices) if i != 3)


@pytest.mark.parametrize("how", ["dtype", "autocast"])
def test_bfloat16_products(how):
    texts, videos, matrices = draw(texts=20, videos=20, words=9, patches=12, width=64, dtype=torch.float32)
    texts = TextFeatures(texts.sentence, texts.words.requires_grad_())
    exact = coarse_to_fine_similarity(texts, videos, *matrices, SCALE)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        dtype = torch.bfloat16 if how == "dtype" else None
        rounded = coarse_to_fine_similarity(texts, videos, *matrices, SCALE, dtype=dtype)
        (found,) = torch.autograd.grad(rounded.sum(), texts.words)
    assert rounded.dtype == found.dtype == torch.float32
    assert torch.equal(rounded[:2], exact[:2])
    torch.testing.assert_close(rounded[2], exact[2], rtol=0, atol=0.05)  # products of 3 are rounded to 0.008
    (expected,) = torch.autograd.grad(exact.sum(), texts.words)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": ("words",)}, "unknown level 'words'; levels are video_sentence, frame_sentence, patch_word"),
        ({"videos": VideoFeatures(torch.ones(2, 8), torch.ones(2, 3, 8))}, "level patch_word needs patches"),
        ({"texts": TextFeatures(torch.ones(2, 8), torch.ones(2, 9, 8))}, "9 words, but .* for up to 7"),
        ({"videos": VideoFeatures(torch.ones(2, 8), torch.ones(2, 6, 8))}, "6 frames, but .* for up to 5"),
    ],
)
def test_what_does_not_fit(change, message):
    texts, videos, matrices = draw()
    given = {"texts": texts, "videos": videos, "levels": LEVELS} | change
    with pytest.raises(ValueError, match=message):
        coarse_to_fine_similarity(given["texts"], given["videos"], *matrices, SCALE, levels=given["levels"])
