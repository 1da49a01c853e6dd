"""A ladder beside T5 decodes with caches what it decodes anew, and its passes are its own."""

import copy
import pickle

import pytest
import torch
from ladder_t5 import build, inputs, with_ladder
from torch import nn


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_caches_is_decoding_anew(beams):
    model, batch = build(), inputs()
    with_ladder(model, merge_last=True)
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    del batch["labels"]
    cached = model.generate(**batch, use_cache=True, **options)
    anew = model.generate(**batch, use_cache=False, **options)
    assert torch.equal(cached.sequences, anew.sequences)
    for one, other in zip(cached.scores, anew.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_steps_with_a_cache_are_one_pass():
    model, batch = build(), inputs()
    with_ladder(model)
    whole = model(**batch).logits
    ids = nn.functional.pad(batch.pop("labels")[:, :-1], (1, 0))
    first = model(**batch, decoder_input_ids=ids[:, :2], use_cache=True)
    states, cache, steps = (first.encoder_last_hidden_state,), first.cache, [first.logits]
    for t in (2, 3):
        step = model(
            encoder_outputs=states,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=ids[:, t : t + 1],
            cache=cache,
            use_cache=True,
        )
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.self_attention_cache.layers[3].keys.shape == (3, 3, 4, 2)  # behind the backbone's 3, a quarter as wide


class Owner(nn.Module):
    """A backbone with its bank."""

    def __init__(self):
        super().__init__()
        self.model = build()
        self.bank, _ = with_ladder(self.model)


def test_copies_and_pickles_go_on_alone():
    owner, batch = Owner(), inputs()
    before = owner.model(**batch).logits
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert torch.equal(other.model(**batch).logits, before)
        with torch.no_grad():
            other.bank.adapters_of("live")["placement-0"].up.bias.add_(1)
        assert not torch.equal(other.model(**batch).logits, before)
    assert torch.equal(owner.model(**batch).logits, before)


def test_refuses_states_that_are_not_its_own():
    model, batch = build(), inputs()
    with_ladder(model)
    states = (torch.zeros(3, 7, 24),)
    with pytest.raises(ValueError, match="has not passed the stack of 'encoder"):
        model(encoder_outputs=states, labels=batch["labels"])
    model(**batch)
    with pytest.raises(ValueError, match="2 rows follows an encoder pass of 3 samples"):
        model(encoder_outputs=(states[0][:2],), labels=batch["labels"][:2])
    model.encoder.block[1].layer[1].DenseReluDense.wi.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="needs gradients"):
        model(**batch)
