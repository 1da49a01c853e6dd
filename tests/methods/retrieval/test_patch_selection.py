"""The perturbed top-k against a plain loop over samples; the selector against one frame scored by hand."""

import math

import pytest
import torch
from torch.nn import functional

from fulgurite.methods.retrieval import patch_selection
from fulgurite.methods.retrieval.patch_selection import PatchSelector, hard_topk, perturbed_topk


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_topk(scores, noise, k, sigma):
    """Selection and estimate of its derivative, one sample and one score at a time."""
    rows, samples, d = noise.shape
    selection, estimate = torch.zeros(rows, k, d, dtype=torch.float64), torch.zeros(rows, k, d, dtype=torch.float64)
    for b in range(rows):
        for m in range(samples):
            perturbed = [scores[b, i].item() + sigma * noise[b, m, i].item() for i in range(d)]
            largest = sorted(sorted(range(d), key=lambda i: -perturbed[i])[:k])
            for place, i in enumerate(largest):
                selection[b, place, i] += 1 / samples
                estimate[b, place, i] += noise[b, m, i] / (samples * sigma)
    return selection, estimate


@pytest.mark.parametrize("numbers", [1 << 22, 1], ids=["one piece", "row by row"])
def test_selection_and_gradient_are_those_of_a_plain_loop(numbers, monkeypatch):
    monkeypatch.setattr(patch_selection, "NUMBERS", numbers)
    scores, noise = (0.1 * normal(3, 7)).requires_grad_(), normal(3, 20, 7, seed=1)
    weights = normal(3, 3, 7, seed=2)
    selection, estimate = plain_topk(scores, noise, 3, 0.2)
    found = perturbed_topk(scores, 3, samples=20, sigma=0.2, noise=noise)
    torch.testing.assert_close(found, selection, rtol=0, atol=1e-12)
    (weights * found).sum().backward()
    torch.testing.assert_close(scores.grad, (weights * estimate).sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_distributions_over_the_scores(dtype):
    scores = (0.05 * normal(4, 9)).to(dtype).requires_grad_()
    found = perturbed_topk(scores, 4, samples=50, generator=torch.Generator().manual_seed(3))
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found > 0).sum(-1).max() > 1  # the noise matters
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 4))
    found.square().sum().backward()
    assert scores.grad.dtype == dtype


def test_noise_that_vanishes_leaves_the_largest():
    scores = normal(5, 12)
    hard = functional.one_hot(hard_topk(scores, 3), 12).double()
    torch.testing.assert_close(perturbed_topk(scores, 3, samples=30, sigma=1e-9), hard)
    scores.requires_grad_(True)
    found = perturbed_topk(scores, 3, sigma=0)
    assert torch.equal(found, hard)
    found.sum().backward()  # as ddp needs: every parameter has a gradient
    assert not scores.grad.any()


def test_of_equal_scores_the_first_are_taken_in_ascending_order():
    scores = torch.zeros(2, 300)
    scores[1, 250], scores[1, 7] = 2, 1
    assert hard_topk(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 7, 250]]


@pytest.mark.parametrize("k", [0, 6])
def test_more_patches_than_there_are_is_an_error(k):
    for select in (hard_topk, perturbed_topk):
        with pytest.raises(ValueError, match=f"k={k} patches of a frame cannot be selected: the frame has 5"):
            select(torch.zeros(2, 5), k)


def test_noise_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"\(2, 9, 5\), expected \(2, 10, 5\)"):
        perturbed_topk(torch.zeros(2, 5), 2, samples=10, noise=torch.zeros(2, 9, 5))


@pytest.fixture(params=["video", "frame"])
def selector(request):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = PatchSelector(8, variant=request.param, k=2, samples=25).double()
        for layer in (made.token, made.joint, made.score):
            torch.nn.init.normal_(layer.weight, std=0.5)
    return made


def plain_score(selector, video, frame, patch):
    """Of one patch of a video (F, N, D), vector by vector."""
    gelu = functional.gelu

    def state(f, n):
        x = video[f, n]
        if selector.of_video:
            x = torch.cat((x, video[f, 0]))
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * selector.norm.weight + selector.norm.bias
        return gelu(selector.token.weight @ x)

    frames = range(len(video)) if selector.of_video else [frame]
    whole = sum(state(f, 0) for f in frames)
    joint = gelu(selector.joint.weight @ torch.cat((state(frame, patch), whole)))
    return math.tanh((selector.score.weight @ joint).item())


def test_scores_are_those_of_single_patches(selector, monkeypatch):
    tokens = normal(3, 4, 6, 8)
    with torch.no_grad():
        selector.norm.weight.copy_(normal(len(selector.norm.weight), seed=1))
        selector.norm.bias.copy_(normal(len(selector.norm.bias), seed=2))
        scores = selector.scores(tokens)
        expected = [[[plain_score(selector, v, f, n) for n in range(1, 6)] for f in range(4)] for v in tokens]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
        monkeypatch.setattr(patch_selection, "TOKENS", 1)
        torch.testing.assert_close(selector.scores(tokens), scores, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("variant", "inputs", "hidden"), [("video", 1024, 512), ("frame", 512, 256)])
def test_published_shapes(variant, inputs, hidden):
    made = PatchSelector(512, variant=variant)
    shapes = {name: tuple(value.shape) for name, value in made.named_parameters()}
    assert shapes == {
        "norm.weight": (inputs,),
        "norm.bias": (inputs,),
        "token.weight": (hidden, inputs),
        "joint.weight": (hidden, 2 * hidden),
        "score.weight": (1, hidden),
    }
    assert made.token.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_class_tokens_are_followed_by_the_patches_of_largest_score(selector):
    tokens = normal(2, 3, 6, 8)
    found = selector(tokens).view(2, 3, 3, 8)
    best = selector.scores(tokens).topk(2).indices.sort().values + 1
    for v in range(2):
        for f in range(3):
            assert torch.equal(found[v, f], tokens[v, f, [0, *best[v, f].tolist()]])
    assert torch.equal(selector(tokens), selector(tokens))


def test_all_patches_without_noise_are_the_tokens(selector):
    tokens = normal(2, 3, 6, 8)
    selector.k, selector.sigma = 5, 0.0
    for seeds in (None, [4, 5]):
        assert torch.equal(selector(tokens, seeds), tokens.flatten(1, 2))
    selector.k = 6
    with pytest.raises(ValueError, match="k=6 patches of a frame cannot be selected: the frame has 5"):
        selector(tokens)


def test_the_noise_of_a_video_depends_on_its_seed_alone(selector):
    tokens = normal(3, 2, 6, 8)
    whole = selector(tokens, [7, 8, 9])
    assert torch.equal(selector(tokens[[2, 0]], [9, 7]), whole[[2, 0]])
    single = torch.cat([selector(video[None], [seed]) for video, seed in zip(tokens, [7, 8, 9])])
    torch.testing.assert_close(single, whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(selector(tokens, [7, 8, 10])[2], whole[2])
    with pytest.raises(ValueError, match="2 seeds for 3 videos"):
        selector(tokens, [1, 2])


def test_one_frame_in_total(selector):
    tokens = normal(1, 1, 6, 8)
    assert selector(tokens).shape == selector(tokens, [0]).shape == (1, 3, 8)


def test_the_selection_is_a_mixture_and_trains_the_score(selector):
    tokens = normal(2, 3, 6, 8).requires_grad_()
    found = selector(tokens, [1, 2])
    scores = selector.scores(tokens)
    mixed = [
        perturbed_topk(scores[v], 2, samples=25, generator=torch.Generator().manual_seed(v + 1)) @ tokens[v, :, 1:]
        for v in range(2)
    ]
    torch.testing.assert_close(found.view(2, 3, 3, 8)[:, :, 1:], torch.stack(mixed), rtol=1e-10, atol=1e-12)
    for name, parameter in selector.named_parameters():
        expected, given = (
            torch.autograd.grad((out**2).sum(), parameter, retain_graph=True)[0] for out in (torch.stack(mixed), found)
        )
        assert given.any(), name
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)


def test_scores_keep_their_precision_under_autocast(selector):
    tokens = normal(2, 3, 6, 8).float()
    exact = selector.scores(tokens.double()).float()
    selector.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(selector.scores(tokens), exact, rtol=1e-5, atol=1e-6)
        assert selector(tokens.bfloat16(), [1, 2]).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"k": 0}, {"samples": 0}, {"sigma": -0.1}, {"variant": "patch"}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PatchSelector(8, **options)
