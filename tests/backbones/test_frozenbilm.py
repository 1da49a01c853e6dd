"""FrozenBiLM against a slow reference: one sample at a time, an own encoder with merged adapters in its
layers, and the mask decoder written out over positions from the paper's formula."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DebertaV2Model

from fulgurite.backbones.frozenbilm import FrozenBiLM, _mask
from fulgurite.checkpoints import digest_of_state
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.compression import matrices
from fulgurite.methods.layer_walk import LayerWalk

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "intermediate_size": 32,
    "position_buckets": 8,
    "max_position_embeddings": 32,
}
FRAMES, WIDTH, TOKENS, SETS = 4, 6, 12, ("initial", "one", "two")


class NumberTokenizer:
    """An answer is a row of token numbers."""

    def __call__(self, texts, max_length, **options):
        return {"input_ids": [[int(n) for n in text.split()][:max_length] for text in texts]}


def build(config=CONFIG, **options):
    backbone = FrozenBiLM(
        pretrained=False, config=config, feature_dim=WIDTH, max_frames=FRAMES, max_tokens=TOKENS, **options
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # sharper than the usual start, so that every part matters in the logits
        for name, tensor in backbone.named_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.5 if "bias" in name else 0.25)
    backbone.__dict__["tokenizer"] = NumberTokenizer()
    backbone.set_answers(["3", "4 5", "6 7 8", "9 9", "1 2 3 4 5 6"])
    return backbone


def build_bank(backbone, sets=SETS, random=True, dropout=0.0):
    placements = [
        Placement(["attention_output", "feed_forward_output"], partial(Bottleneck, reduction=4, dropout=dropout)),
        Placement(["video_projection"], Replace),
    ]
    bank = AdapterBank(backbone, placements, sets)
    if random:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
    return bank.eval()


@pytest.fixture(scope="module")
def model():
    backbone = build(routing_layer=-2)
    return backbone, build_bank(backbone)


def batch_of(lengths=(9, 12, 5), frames=(4, 1, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, CONFIG["vocab_size"], (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    video_mask = torch.arange(FRAMES) < torch.tensor(frames)[:, None]
    video = torch.randn(len(lengths), FRAMES, WIDTH, generator=generator) * video_mask[..., None]
    return {
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "video": video,
        "video_mask": video_mask,
        "mask_position": torch.tensor([length // 2 for length in lengths]),
    }


def one(batch, row, length=None):
    alone = {key: value[row : row + 1] for key, value in batch.items()}
    if length is not None:
        alone |= {key: alone[key][:, :length] for key in ("input_ids", "attention_mask")}
    return alone


class Adapted(nn.Module):
    def __init__(self, dense, adapter):
        super().__init__()
        self.dense, self.adapter = dense, adapter

    def forward(self, x):
        z = self.dense(x)
        down_w, down_b, up_w, up_b = self.adapter
        return z + F.relu(z @ down_w.T + down_b) @ up_w.T + up_b


def merged(bank, site, shares, names=SETS):
    """Each tensor of the adapters at ``site``, averaged over the sets."""
    adapters = [list(bank.sets[name][site.replace(".", "/")].parameters()) for name in names]
    return [sum(p * t for p, t in zip(shares, tensors)) for tensors in zip(*adapters)]


def bucket(distance, buckets, longest):
    middle = buckets // 2
    if abs(distance) <= middle:
        return distance
    far = math.log(abs(distance) / middle) / math.log((longest - 1) / middle) * (middle - 1)
    return int(math.copysign(math.ceil(far) + middle, distance))


def slow_layer(layer, query, states, real, table, config):
    """Disentangled attention from ``query`` to ``states`` (S, D) by position, then the rest of the block."""
    own, span = layer.attention.self, config.position_buckets
    heads, size = config.num_attention_heads, config.attention_head_size
    q, k, v = (
        f(x).unflatten(-1, (heads, size))
        for f, x in zip((own.query_proj, own.key_proj, own.value_proj), (query, states, states))
    )
    table_k, table_q = (f(table).unflatten(-1, (heads, size)) for f in (own.key_proj, own.query_proj))
    context = torch.zeros_like(v)
    keys = [j for j in range(len(states)) if real[j]]
    for i in keys:
        for head in range(heads):
            scores = []
            for j in keys:
                at = min(max(bucket(i - j, span, config.max_position_embeddings) + span, 0), 2 * span - 1)
                content = q[i, head] @ k[j, head]
                position = q[i, head] @ table_k[at, head] + k[j, head] @ table_q[at, head]
                scores.append((content + position) / math.sqrt(3 * size))
            context[i, head] = torch.stack(scores).softmax(0) @ v[keys, head]
    x = layer.attention.output.LayerNorm(layer.attention.output.dense(context.flatten(1)) + query)
    return layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)


def reference(model, batch, row, shares=None, names=SETS):
    """Logits (A,) and routing parts of one sample; ``shares`` None leaves all adapters out."""
    backbone, bank = model
    state = backbone.state_dict()
    encoder = DebertaV2Model(backbone.deberta.config).eval()
    own = {k.removeprefix("deberta."): v for k, v in state.items() if k.startswith("deberta.")}
    positions = own.pop("embeddings.position_embeddings.weight")
    projection = [own.pop(f"embeddings.linear_video.{n}") for n in ("weight", "bias")]
    encoder.load_state_dict(own)
    if shares is not None:
        projection = merged(bank, "deberta.embeddings.linear_video", shares, names)
        for number, layer in enumerate(encoder.encoder.layer):
            site = f"deberta.encoder.layer.{number}"
            for inner, where in ((layer.attention.output, "attention.output"), (layer.output, "output")):
                inner.dense = Adapted(inner.dense, merged(bank, f"{site}.{where}.dense", shares, names))
    embeds, mask = encoder.embeddings.word_embeddings(batch["input_ids"][row]), batch["attention_mask"][row]
    at = int(batch["mask_position"][row])
    frames = torch.zeros(WIDTH)
    if "video" in batch:
        video, real = batch["video"][row], batch["video_mask"][row]
        embeds = torch.cat([video @ projection[0].T + projection[1], embeds])
        mask, at, frames = torch.cat([real.long(), mask]), at + FRAMES, video[real].mean(0)
    hidden = encoder(inputs_embeds=embeds[None], attention_mask=mask[None], output_hidden_states=True).hidden_states
    table = encoder.encoder.LayerNorm(encoder.encoder.rel_embeddings.weight)
    query = positions[: len(mask)] + hidden[-2][0]
    for _ in range(2):
        query = slow_layer(encoder.encoder.layer[-1], query, hidden[-2][0], mask, table, encoder.config)
    head = {k.removeprefix("lm_predictions.lm_head."): v for k, v in state.items()}
    t = F.gelu(query[at] @ head["dense.weight"].T + head["dense.bias"])
    t = F.layer_norm(t, t.shape, head["LayerNorm.weight"], head["LayerNorm.bias"], 1e-7)
    words = own["embeddings.word_embeddings.weight"]
    answers = [torch.stack([words[int(n)] for n in a.split()[:5]]).mean(0) for a in backbone.answers]
    return torch.stack(answers) @ t, (frames, hidden[backbone.routing_layer][0][mask.bool()].mean(0))


@torch.no_grad()
def test_logits_and_routing_equal_the_slow_reference(model):
    backbone, bank = model
    batch = batch_of()
    with bank.use("one"):
        out = backbone(batch)
    for row in range(3):
        logits, parts = reference(model, batch, row, (0, 1, 0))
        torch.testing.assert_close(out.logits[row], logits, atol=1e-5, rtol=1e-5)
        for ours, theirs, width in zip(out.routing, parts, backbone.routing_widths):
            torch.testing.assert_close(ours[row], theirs, atol=1e-5, rtol=1e-5)
            assert ours.shape == (3, width)
    with bank.use(None):
        bare = backbone(batch).logits
    torch.testing.assert_close(bare[0], reference(model, batch, 0)[0], atol=1e-5, rtol=1e-5)
    assert (bare - out.logits).abs().max() > 0.1


@torch.no_grad()
def test_per_sample_mixture_equals_merged_weights(model):
    backbone, bank = model
    batch = batch_of()
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    with bank.use(shares):
        mixed = backbone(batch).logits
    for row in range(3):
        torch.testing.assert_close(mixed[row], reference(model, batch, row, shares[row])[0], atol=1e-5, rtol=1e-5)
    with bank.use("two"):
        torch.testing.assert_close(mixed[1], backbone(batch).logits[1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_text_alone(model):
    backbone, bank = model
    batch = {k: v for k, v in batch_of().items() if not k.startswith("video")}
    shares = torch.tensor([[0.0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]])
    with bank.use(shares):
        out = backbone(batch)
        absent = backbone(batch | {"video": None})
    for row in range(3):
        logits, _ = reference(model, batch, row, shares[row])
        torch.testing.assert_close(out.logits[row], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(absent.logits, out.logits)
    assert torch.equal(out.routing[0], torch.zeros(3, WIDTH))


@torch.no_grad()
def test_a_sample_does_not_see_its_batch_or_padding(model):
    backbone, bank = model
    lengths = (9, 12, 5)
    batch = batch_of(lengths)
    with bank.use("one"):
        together = backbone(batch)
        for row, length in enumerate(lengths):
            alone = backbone(one(batch, row, length))
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone.routing[1][0], together.routing[1][row], atol=1e-5, rtol=1e-5)
        noise = batch["video"] + 100 * ~batch["video_mask"][..., None]
        padded = backbone(batch | {"video": noise})
    torch.testing.assert_close(padded.logits, together.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.routing[0], together.routing[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fresh_adapters_change_no_bit():
    backbone = build()
    bank = build_bank(backbone, random=False)
    batch = batch_of()
    with bank.use(None):
        bare = backbone(batch).logits
    with bank.use("live"):
        assert torch.equal(backbone(batch).logits, bare)


@torch.no_grad()
def test_adapter_acts_before_dropout_residual_and_norm(model):
    backbone, bank = model
    site = "deberta.encoder.layer.1.attention.output"
    seen = {}
    handle = backbone.get_submodule(site).register_forward_hook(
        lambda module, args, output: seen.update(a=args[0], x=args[1], y=output)
    )
    with bank.use("two"):
        backbone(batch_of())
    handle.remove()
    block = backbone.get_submodule(site)
    z = F.linear(seen["a"], block.dense.weight, block.dense.bias)
    down_w, down_b, up_w, up_b = merged(bank, f"{site}.dense", (0, 0, 1))
    z = z + (F.relu(z @ down_w.T + down_b) @ up_w.T + up_b)
    expected = F.layer_norm(z + seen["x"], (16,), block.LayerNorm.weight, block.LayerNorm.bias, 1e-7)
    torch.testing.assert_close(seen["y"], expected, atol=1e-6, rtol=1e-6)


def test_only_the_live_set_trains():
    backbone = build(train_dropout="official")
    bank = build_bank(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    optimizer = torch.optim.Adam(bank.parameters_of("live"), lr=0.1)
    F.cross_entropy(backbone(batch_of()).logits, torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in bank.parameters_of("live"))
    assert all(p.grad is None for name in SETS for p in bank.parameters_of(name))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_dropout_only_in_training_and_only_where_asked():
    batch = batch_of()
    for option, same in (("official", False), ("off", True)):
        backbone = build(train_dropout=option)
        still = backbone(batch).logits
        backbone.train()
        torch.manual_seed(0)
        assert torch.equal(backbone(batch).logits, still) == same
        backbone.eval()
        assert torch.equal(backbone(batch).logits, still)


def test_answer_bias_is_zero_or_the_mean_over_the_tokens(model):
    backbone = build(answer_bias="mean")
    bias = backbone.lm_predictions["lm_head"].bias
    expected = torch.stack([bias[3], bias[[4, 5]].mean(), bias[[6, 7, 8]].mean(), bias[9], bias[1:6].mean()])
    torch.testing.assert_close(backbone.answer_offset, expected)
    batch = batch_of()
    zero = build()
    torch.testing.assert_close(backbone(batch).logits - zero(batch).logits, expected.expand(3, 5))
    with pytest.raises(ValueError, match=r"repeated: \['1'\]"):
        zero.set_answers(["1", "2", "1"])
    with pytest.raises(ValueError, match="non-empty"):
        zero.set_answers([])


def test_every_place_exists(model):
    backbone, _ = model
    assert len(backbone.spec.block_names(backbone, "text")) == 3
    for point in backbone.spec.points:
        assert backbone.spec.point_names(backbone, point)
    assert isinstance(backbone.get_submodule(backbone.spec.head), nn.Module)


def test_random_weights_repeat_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = build()
    assert torch.equal(torch.rand(1), expected)
    assert first.fingerprint == build().fingerprint
    assert first.fingerprint != build(init_seed=1).fingerprint


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="pass the 32 positions"):
        FrozenBiLM(pretrained=False, config=CONFIG, max_frames=10, max_tokens=23)
    with pytest.raises(ValueError, match="pretrained: false"):
        FrozenBiLM(config=CONFIG)
    with pytest.raises(ValueError, match="position_biased_input=false"):
        FrozenBiLM(pretrained=False, config=CONFIG | {"position_biased_input": True}, max_tokens=8)
    with pytest.raises(RuntimeError, match="set_answers"):
        FrozenBiLM(pretrained=False, config=CONFIG, max_tokens=8)(batch_of())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lengths", [(9, 12, 5), (4, 2)])  # two of 8 tokens are as many as there are positions
def test_blocks_are_passed_once_and_compressed_on_what_they_see(shared, lengths):
    """The walk over the encoder alone; what lies beyond, the mask decoder, uses the last block twice more.

    Tokens that are no padding count, and positions only where a layer reads nothing else.
    """
    backbone = build(config=CONFIG | {"share_att_key": shared})
    batch = batch_of(lengths, frames=(4, 1, 2)[: len(lengths)])

    def masks(batch, names):
        found = backbone.token_masks(batch)
        return {name: m for name in names for pattern, m in found.items() if re.fullmatch(pattern, name)}

    walk = LayerWalk(backbone, backbone.spec, [batch, batch], backbone.pass_blocks, masks)
    rows = {}

    def note(name, x):
        of_tokens = x.shape[:2] == _mask(batch).shape
        assert of_tokens != ("pos_" in name) or name in rows
        rows.setdefault(name, x.detach()[_mask(batch).bool()] if of_tokens else x.detach()[0])

    hooks = [
        backbone.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in matrices(walk)
    ]
    with torch.no_grad():
        backbone(batch)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for block in walk:
            found = block.linears()
            assert len(found) == (6 if shared else 8)
            for group in block.input_groups(found):
                for name, energy in block.grams([group], diagonal=True).means().items():
                    torch.testing.assert_close(energy, rows[name].double().square().mean(0), rtol=1e-5, atol=1e-7)


def test_weights_that_changed_change_the_digest_and_the_answers():
    backbone = build()
    before = backbone.fingerprint, backbone.answer_table.clone()
    with torch.no_grad():
        backbone.deberta.embeddings.word_embeddings.weight.mul_(2)
    assert backbone.fingerprint == before[0]
    backbone.refresh()
    assert backbone.fingerprint == digest_of_state(backbone.state_dict()) != before[0]
    torch.testing.assert_close(backbone.answer_table, 2 * before[1])
    assert backbone.derived == ("answer_table", "answer_offset")
