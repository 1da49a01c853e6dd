"""VL-BART and VL-T5 against the plain library model, slow loops of full recomputation, and their invariances."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fulgurite.backbones.generation import IGNORED

KINDS = ("bart", "t5")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=KINDS)
def model(request, make_generative):
    """A tiny model of each kind whose end token is about as likely as others."""
    return make_generative(request.param, train_dropout="off").eval()


def batch_of(lengths=(6, 3, 5), pictures=(1, 2, 1), tokens=4, seed=0):
    """Text, and pictures of ``tokens`` tokens, all random."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 40, mask.shape, generator=generator)
    batch = {"text": ids.masked_fill(~mask, 1), "text_mask": mask}
    if pictures is None:
        return batch
    picture = torch.full((len(lengths), max(pictures) * tokens), -1)
    for row, count in zip(picture, pictures):
        row[: count * tokens] = torch.arange(count).repeat_interleave(tokens)
    features = torch.randn(*picture.shape, 12, generator=generator)
    return {**batch, "features": features, "picture": picture}


def row_of(batch, row):
    """One sample of a batch, without its padding."""
    text, picture = batch["text_mask"][row], batch["picture"][row] >= 0
    out = {"text": batch["text"][row, text][None], "text_mask": torch.ones(1, int(text.sum()), dtype=torch.bool)}
    return {**out, "features": batch["features"][row, picture][None], "picture": batch["picture"][row, picture][None]}


def targets(rows=3, seed=1):
    ids = torch.randint(4, 40, (rows, 4), generator=torch.Generator().manual_seed(seed))
    ids[0, 3] = IGNORED
    return ids


def plain(model):
    """The library's own model with the same weights, frozen: with gradients attention takes other kernels."""
    fresh = type(model.language)(model.language.config).eval().requires_grad_(False)
    fresh.load_state_dict(model.language.state_dict())
    return fresh


def test_without_pictures_it_is_the_plain_library_model_bit_for_bit(model):
    batch, labels = batch_of(pictures=None), targets()
    expected = plain(model)(input_ids=batch["text"], attention_mask=batch["text_mask"].long(), labels=labels).logits
    assert torch.equal(model(batch, labels), expected)


def test_whether_there_are_pictures_matters(model):
    batch = batch_of()
    bare = {name: batch[name] for name in ("text", "text_mask")}
    assert not torch.allclose(model(batch, targets()), model(bare, targets()), atol=1e-3)


def test_padding_changes_no_other_row(model):
    batch, labels = batch_of(), targets()
    together = model(batch, labels)
    for row in range(3):
        alone = model(row_of(batch, row), labels[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    dirty = {**batch, "features": batch["features"].masked_fill((batch["picture"] < 0)[..., None], 7.0)}
    dirty["text"] = batch["text"].masked_fill(~batch["text_mask"], 5)
    torch.testing.assert_close(model(dirty, labels), together, atol=1e-5, rtol=1e-5)


def test_permuted_visual_tokens_with_their_numbers_give_permuted_states(model):
    batch = batch_of(pictures=(2, 2, 2))
    batch["order"] = torch.arange(4).repeat(2).expand(3, -1)
    states, _ = model.encode(batch)
    assert torch.equal(states, model.encode({k: v for k, v in batch.items() if k != "order"})[0])
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    turned = {**batch, **{name: batch[name][:, turn] for name in ("features", "picture", "order")}}
    found, length = model.encode(turned)[0], batch["text"].shape[1]
    torch.testing.assert_close(found[:, length:], states[:, length:][:, turn], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :length], states[:, :length], atol=1e-5, rtol=1e-5)
    still = {**turned, "order": batch["order"]}
    assert not torch.allclose(model.encode(still)[0][:, :length], states[:, :length], atol=1e-3)


def test_the_bias_of_text_and_text_is_that_without_visual_tokens(make_generative):
    model = make_generative("t5", train_dropout="off")
    seen = []
    model.language.encoder.block[1].register_forward_pre_hook(lambda _, args: seen.append(args))
    batch = batch_of()
    model.encode(batch)
    model.encode({name: batch[name] for name in ("text", "text_mask")})
    (_, mask, bias), (_, _, alone) = seen
    assert bias.shape[-2:] == (14, 14)
    assert torch.equal(bias[..., :6, :6], alone)
    assert not bias[..., 6:, :].any()
    assert not bias[..., :, 6:].any()
    assert alone.abs().min() > 0
    assert torch.equal(mask[:, 0, 0], torch.cat([batch["text_mask"], batch["picture"] >= 0], dim=1))


def slow_beams(library, states, mask, num_beams, steps):
    """Beam search by full recomputation: sums of log-probabilities over length; an end counts among the best beams."""
    end, beams, ended = library.config.eos_token_id, [(0.0, [library.config.decoder_start_token_id])], []
    for step in range(1, steps + 1):
        ids, many = torch.tensor([ids for _, ids in beams]), (len(beams), -1, -1)
        out = library(
            encoder_outputs=(states.expand(*many),), attention_mask=mask.long(), decoder_input_ids=ids, use_cache=False
        )
        scores = F.log_softmax(out.logits[:, -1], dim=-1) + torch.tensor([[score] for score, _ in beams])
        best = scores.flatten().topk(2 * num_beams)
        rows = [divmod(int(place), scores.shape[1]) for place in best.indices]
        found = [(float(score), [*beams[row][1], token]) for score, (row, token) in zip(best.values, rows)]
        ended += [(score / step, ids) for score, ids in found[:num_beams] if ids[-1] == end]
        beams = [pair for pair in found if pair[1][-1] != end][:num_beams]
        ended = sorted(ended, key=lambda pair: -pair[0])[:num_beams]
        if len(ended) == num_beams and ended[-1][0] >= beams[0][0] / step:
            break
    else:
        ended += [(score / steps, ids) for score, ids in beams]
    return max(ended, key=lambda pair: pair[0])[1][1:]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_writing_with_caches_is_the_slow_search(model, num_beams):
    batch = batch_of(lengths=(6, 3, 5, 2), pictures=(1, 2, 1, 0), seed=3)
    scramble(model)
    found = model.generate_ids(batch, num_beams=num_beams, max_new_tokens=6)
    end, pad, lengths = model.language.config.eos_token_id, model.language.config.pad_token_id, set()
    for row, ids in enumerate(found.tolist()):
        expected = slow_beams(model.language, *model.encode(row_of(batch, row)), num_beams, 6)
        lengths.add(len(expected))
        assert ids[: len(expected)] == expected
        assert {end, pad}.issuperset(ids[len(expected) :])
    assert len(lengths) > 1


def scramble(model):
    """Turn what is read out, nearer to the end token: a model of random weights repeats what it reads."""
    turn = torch.randn(16, 16, generator=torch.Generator().manual_seed(4)) / 4
    table, share = model.token_table, 2 if "Bart" in type(model).__name__ else 1
    end, scale = share * table[2] / table[2].norm(), 1 / table[4:40].norm(dim=1).mean()

    def read_out(slot, args, y):
        return scale * (4 * F.normalize(torch.sin(5 * y) @ turn, dim=-1) + end)

    model.read_out.register_forward_hook(read_out)


def test_texts_leave_special_tokens_out(make_generative):
    model = make_generative("bart", tokenizer=True, train_dropout="off")
    out = model.target_batch(["a red bus", "no"])["targets"]
    assert out.tolist() == [[101, 1037, 2417, 3902, 102], [101, 2053, 102, IGNORED, IGNORED]]
    assert model.target_batch(["a red bus", "no"], [3, None])["targets"].tolist() == [
        [101, 1037, 102],
        [101, 2053, 102],
    ]
    model.generate_ids = lambda *_: torch.tensor([[101, 1037, 2417, 3902, 102], [101, 2053, 102, 0, 0]])
    assert model.generate({}) == ["a red bus", "no"]


def test_a_stack_may_read_the_text_alone(model):
    batch, labels = batch_of(), targets()
    bare = {name: batch[name] for name in ("text", "text_mask")}
    calls = []

    def text_only(slot, args, kwargs, y):
        calls.append((args[0].shape[1], kwargs))
        return y[:, : kwargs["text_length"]]

    model.encoder_embedded.register_forward_hook(text_only, with_kwargs=True)
    assert torch.equal(model(batch, labels), model(bare, labels))
    assert calls[0][0] == 14
    assert calls[0][1]["text_length"] == 6
    assert torch.equal(calls[0][1]["mask"][:, 6:], batch["picture"] >= 0)
    model.encoder_embedded.register_forward_hook(lambda slot, args, y: y[:, :2])
    with pytest.raises(ValueError, match="encoder_embedded gives 2 positions of 14"):
        model(batch, labels)


def test_what_passes_through_the_decoders_slots_goes_on(model):
    batch, labels = batch_of(), targets()
    usual = model(batch, labels)
    owner = copy.deepcopy(model)
    seen = []

    def embedded(slot, args, kwargs, y):
        seen.append((args[0].shape, kwargs))

    owner.decoder_embedded.register_forward_hook(embedded, with_kwargs=True)
    owner.read_out.register_forward_hook(lambda slot, args, y: torch.zeros_like(y))
    assert not owner(batch, labels).any()
    assert seen == [((3, 4, 16), {"text_length": 4, "mask": None})]
    assert torch.equal(model(batch, labels), usual)
    model.decoder_embedded.register_forward_hook(lambda slot, args, y: y.flip(1))
    assert not torch.allclose(model(batch, labels), usual, atol=1e-3)


def test_dropout_is_on_while_training_only_where_told(make_generative):
    for kind in KINDS:
        model, batch, labels = make_generative(kind), batch_of(), targets()
        usual = model(batch, labels)
        model.train()
        assert not torch.equal(model(batch, labels), usual)
        model.eval()
        assert torch.equal(model(batch, labels), usual)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_options_that_exclude_each_other(make_generative):
    with pytest.raises(ValueError, match="pretrained: false"):
        make_generative("bart", pretrained=True)
    with pytest.raises(ValueError, match="extra_tokens=-1"):
        make_generative("bart", extra_tokens=-1)
