"""Soft prompts of VL-BART and VL-T5, in front of the text and in front of the decoder."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.soft_prompt import SoftPrompt

pytestmark = pytest.mark.usefixtures("one_thread")
P = 3


@pytest.fixture(params=["bart", "t5"])
def model(request, make_generative):
    return make_generative(request.param, train_dropout="off")


def prompted(model, *points, sets=("a", "b"), hidden=5):
    """The model's bank, with strong prompts that differ by set."""
    bank = AdapterBank(model, [Placement(list(points), partial(SoftPrompt, length=P, hidden=hidden, std=0.9))], sets)
    for number, name in enumerate(bank.names):
        bank.reset(name, torch.Generator().manual_seed(number))
    return bank


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    text = torch.randint(4, 40, mask.shape, generator=generator).masked_fill(~mask, 1)
    features = torch.randn(2, 4, 12, generator=generator)
    return {"text": text, "text_mask": mask, "features": features, "picture": torch.zeros(2, 4, dtype=torch.long)}


TARGETS = torch.tensor([[7, 8, 9, 2], [5, 2, -100, -100]])


def test_prompts_of_the_encoder_are_embeddings_of_earlier_text(model):
    """Rows of the token table that a plain model reads, where no position follows from a token's place."""
    bank, batch = prompted(model, "encoder_prompt"), batch_of()
    (adapter,) = bank.adapters_of("live").values()
    seen = []
    model.encoder_embedded.register_forward_hook(
        lambda slot, args, kwargs, y: seen.append((y, kwargs)), with_kwargs=True
    )
    model(batch, TARGETS)
    with bank.use(None):
        model(batch, TARGETS)
    (states, call), (bare, _) = seen
    assert states.shape[1] == P + 9
    assert call["text_length"] == P + 5
    assert call["mask"][:, :P].all()
    assert torch.equal(call["mask"][:, P : P + 5], batch["text_mask"])
    assert torch.equal(states[:, P:], bare)
    norm = model.language.model.encoder.layernorm_embedding if hasattr(model.language, "model") else nn.Identity()
    torch.testing.assert_close(states[:, :P], norm(adapter.prompts()).expand(2, -1, -1))


def test_prompts_of_the_decoder_are_past_keys_and_values(model):
    """Against the library's decoder: the prompts run first, and leave a cache; then the tokens."""
    bank, batch = prompted(model, "decoder_prompt"), batch_of()
    (adapter,) = bank.adapters_of("live").values()
    states, mask = model.encode(batch)
    fresh = copy.deepcopy(model.language)
    given = {"encoder_hidden_states": states, "encoder_attention_mask": mask.long()}
    prompts = adapter.prompts().expand(2, -1, -1)
    past = fresh.get_decoder()(inputs_embeds=prompts, use_cache=True, **given)
    cache = {"cache" if "cache" in past else "past_key_values": past.get("cache", past.get("past_key_values"))}
    ids = fresh.prepare_decoder_input_ids_from_labels(TARGETS)
    state = fresh.get_decoder()(input_ids=ids, **cache, **given).last_hidden_state
    if fresh.config.model_type == "t5":
        state = state * fresh.model_dim**-0.5
    expected = fresh.lm_head(state)
    found = model(batch, TARGETS)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with bank.use(None):
        assert not torch.allclose(model(batch, TARGETS), expected, atol=1e-2)


def test_writing_after_prompts_agrees_with_the_forward_pass(model):
    prompted(model, "encoder_prompt", "decoder_prompt")
    batch = batch_of()
    ids = model.generate_ids(batch, max_new_tokens=5)
    logits = model(batch, ids)
    for row, written in enumerate(ids.tolist()):
        length = written.index(2) + 1 if 2 in written else len(written)
        assert logits[row].argmax(-1)[:length].tolist() == written[:length]
    assert not model.language.get_decoder().embed_tokens._forward_hooks


@torch.no_grad()
def test_beams_after_prompts_are_at_least_as_likely(model):
    prompted(model, "encoder_prompt", "decoder_prompt")
    batch = {name: tensor[:1] for name, tensor in batch_of().items()}

    def score(num_beams):
        (written,) = model.generate_ids(batch, num_beams=num_beams, max_new_tokens=3)
        length = (written.tolist() + [2]).index(2) + 1
        scores = model(batch, written[None]).log_softmax(-1)[0].gather(1, written[:, None])[:length]
        return float(scores.mean())

    assert score(5) >= score(1)


def test_beams_of_a_sample_keep_its_prompts(model):
    bank, batch = prompted(model, "encoder_prompt", "decoder_prompt"), batch_of()
    turn, alone = torch.randn(16, 16, generator=torch.Generator().manual_seed(4)), []
    model.read_out.register_forward_hook(lambda slot, args, y: torch.sin(5 * y) @ turn)  # or it repeats itself
    for row, name in enumerate(("b", "a")):
        with bank.use(name):
            alone.append(model.generate_ids({n: t[row : row + 1] for n, t in batch.items()}, 2, 4)[0].tolist())
    with bank.use(torch.tensor([1, 0])):
        together = model.generate_ids(batch, 2, 4).tolist()
    assert alone[0] != alone[1]
    assert [row[: len(one)] for row, one in zip(together, alone)] == alone


@pytest.mark.parametrize("point", ["encoder_prompt", "decoder_prompt"])
def test_sets_are_chosen_and_mixed_per_sample(model, point):
    bank, batch = prompted(model, point), batch_of()
    outputs = {}
    for name in ("a", "b"):
        with bank.use(name):
            outputs[name] = model(batch, TARGETS)
    with bank.use(torch.tensor([1, 0])):
        found = model(batch, TARGETS)
    torch.testing.assert_close(found, torch.stack([outputs["b"][0], outputs["a"][1]]), atol=1e-5, rtol=1e-5)
    with bank.use(torch.tensor([[0.0, 1.0], [0.25, 0.75]])):
        found = model(batch, TARGETS)
    torch.testing.assert_close(found[0], outputs["b"][0], atol=1e-5, rtol=1e-5)
    (live,) = bank.adapters_of("live").values()
    prompts = [adapter.prompts() for name in "ab" for adapter in bank.adapters_of(name).values()]
    live.prompts = lambda: 0.25 * prompts[0] + 0.75 * prompts[1]
    torch.testing.assert_close(found[1], model(batch, TARGETS)[1], atol=1e-5, rtol=1e-5)


def test_gradients_reach_all_tensors_of_the_live_prompts_alone(model):
    bank = prompted(model, "encoder_prompt", "decoder_prompt")
    model(batch_of(), TARGETS).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in bank.parameters_of("live"))
    assert all(p.grad is None for p in [*bank.parameters_of("a"), *model.parameters()])
    owner = copy.deepcopy(nn.ModuleList([model, bank]))
    usual = owner[0](batch_of(), TARGETS)
    bank.reset("live", torch.Generator().manual_seed(9))
    assert torch.equal(owner[0](batch_of(), TARGETS), usual)
    assert not torch.equal(model(batch_of(), TARGETS), usual)


def test_places_that_cannot_become_longer_are_refused(model):
    with pytest.raises(ValueError, match="choose the points encoder_prompt or decoder_prompt"):
        prompted(model, "self_attention_output")
    with pytest.raises(ValueError, match="choose the points encoder_prompt or decoder_prompt"):
        prompted(model, "read_out")
