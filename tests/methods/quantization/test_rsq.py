import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rsq import TokenImportance, rolled_copies
from fulgurite.methods.quantization.token_importance import (
    centroid_importance,
    frequency_importance,
    kmeans,
    token_weights,
)
from fulgurite.methods.statistics.gram import gram_of, token_shares
from fulgurite.methods.structure import ModelSpec, Tower

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def walk_of(model, spec, name, masked=False, ranks=None, batches=None):
    """Over a model with two batches; the second example of each is padded at its end where ``masked``."""
    if batches is None:
        batches = [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mask = MASK if masked else None

    def forward(ids):
        more = {"labels": ids} if name == "t5" else {}
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **more)

    masks = (lambda batch, names: dict.fromkeys(names, MASK)) if masked else None
    extra = {} if ranks is None else {"ranks": ranks}
    return LayerWalk(model, spec, batches, forward, masks=masks, **extra)


def eager(model):
    """The same model, whose attention gives its probabilities."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_attention_mass_is_the_sum_of_the_probabilities_that_the_model_gives(name, masked, language_models):
    model, spec = language_models[name]
    walk = walk_of(model, spec, name, masked)
    found = [TokenImportance()(block) for block in walk]
    more = {"output_attentions": True, "use_cache": False, "attention_mask": MASK if masked else None}
    for number, ids in enumerate(walk.batches):
        with torch.no_grad():
            out = eager(model)(input_ids=ids, **({"labels": ids} if name == "t5" else {}), **more)
        layers = out.attentions if name == "llama" else (*out.encoder_attentions, *out.decoder_attentions)
        for block, probabilities in zip(found, layers, strict=True):
            real = MASK if masked else torch.ones(2, 6)
            # The decoder is not told of padding; what padding looks at does not count there either.
            seen = probabilities * real[:, None, :, None]
            if masked:
                seen = probabilities.masked_fill(MASK[:, None, None, :] == 0, 0)
                seen = seen / seen.sum(-1, keepdim=True) * MASK[:, None, :, None]
            mass = seen.sum((1, 2))
            assert mass.sum() == pytest.approx(real.sum().item() * probabilities.shape[1])
            mask = MASK if masked else None
            expected = token_shares(token_weights(mass, mask), mask)
            one = block[number]
            for each in one.values() if isinstance(one, dict) else [one]:
                torch.testing.assert_close(each, expected)


def test_layers_that_read_another_tower_are_left_out(language_models):
    walk = walk_of(*language_models["t5"], "t5")
    for block in walk:
        (found, _) = TokenImportance("norm")(block)
        if block.tower.name == "encoder":
            assert found.shape == (2, 6)
        else:
            every = set(block.linears())
            cross = {f"{block.name}.layer.1.EncDecAttention.{part}" for part in "kv"}
            assert set(found) == every - cross
    compressor = Gptq(3, "channel")
    model = copy.deepcopy(walk.model)
    again = walk_of(model, walk.spec, "t5")
    compressor.begin(matrices(again))
    reports = [r for b in compressed_blocks(again, compressor, token_weights=TokenImportance()) for r in b.reports]
    assert len(reports) == len(matrices(again))


@pytest.mark.parametrize("kind", ["norm", "change", "similarity", "dot"])
def test_kinds_are_those_of_plain_loops_over_tokens(kind, language_models):
    walk = walk_of(*language_models["llama"], "llama", masked=True)
    for block in walk:
        found = TokenImportance(kind, minimum=0.1)(block)
        for number, y in enumerate(block.outputs()):
            x = block.inputs[number]
            raw = torch.zeros(2, 6, dtype=torch.float64)
            for b, t in itertools.product(range(2), range(6)):
                own, real = x[b, t], [x[b, u] for u in range(6) if MASK[b, u]]
                if kind == "norm":
                    raw[b, t] = own.norm()
                elif kind == "change":
                    raw[b, t] = -(own - y[b, t]).norm()
                elif kind == "similarity":
                    raw[b, t] = sum((own - other).square().sum() for other in real) / len(real)
                else:
                    raw[b, t] = sum(own @ other for other in real)
            torch.testing.assert_close(found[number], token_shares(token_weights(raw, MASK, minimum=0.1), MASK))


def test_rare_tokens_and_those_far_from_centroids(language_models, on_ranks):
    model, spec = language_models["llama"]
    batches = [torch.randint(3, 9, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    block = next(iter(walk_of(model, spec, "llama", batches=batches)))
    counts = torch.stack([(torch.stack(batches) == token).sum() for token in range(9)])
    rare = TokenImportance("frequency")(block)
    centres = kmeans(torch.cat([x.flatten(0, 1) for x in block.inputs]), 5, seed=2)
    far = TokenImportance("centroids", num_centroids=5, seed=2)(block)
    for number, ids in enumerate(batches):
        torch.testing.assert_close(rare[number], token_shares(token_weights(frequency_importance(ids, counts))))
        expected = token_shares(token_weights(centroid_importance(block.inputs[number], centres)))
        torch.testing.assert_close(far[number], expected)

    def work(ranks):
        own = walk_of(copy.deepcopy(model), spec, "llama", ranks=ranks, batches=batches[ranks.rank :: 2])
        first = next(iter(own))
        return TokenImportance("frequency")(first), TokenImportance("centroids", num_centroids=5, seed=2)(first)

    for rank, (own_rare, own_far) in enumerate(on_ranks(2, work)):
        for number in range(2):
            torch.testing.assert_close(own_rare[number], rare[2 * number + rank])
            torch.testing.assert_close(own_far[number], far[2 * number + rank])


def test_padding_makes_no_token_frequent(language_models):
    batches = [torch.randint(3, 9, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for ids in batches:
        ids[MASK == 0] = ids[0, 0]  # filled with what is a token elsewhere
    block = next(iter(walk_of(*language_models["llama"], "llama", masked=True, batches=batches)))
    counts = Counter(torch.cat([ids[MASK != 0] for ids in batches]).tolist())
    for found, ids in zip(TokenImportance("frequency")(block), batches, strict=True):
        raw = torch.tensor([[-float(counts[token]) for token in row] for row in ids.tolist()])
        torch.testing.assert_close(found, token_shares(token_weights(raw, MASK), MASK))


def test_runs_of_the_sequence_are_the_gram_of_their_tokens(language_models):
    walk = walk_of(*language_models["llama"], "llama")
    block = next(iter(walk))
    weights = TokenImportance("chunks", chunks="0_2_3")(block)
    assert weights[0].tolist() == [[1.5, 1.5, 0, 0, 1.5, 1.5]] * 2
    (queries, *_) = block.input_groups(block.linears())
    found = block.grams([queries], weights).means()[queries[0]]
    norm = block.module.input_layernorm
    rows = torch.cat([norm(x)[:, [0, 1, 4, 5]].flatten(0, 1).detach() for x in block.inputs])
    torch.testing.assert_close(found, gram_of(rows, None, torch.float64) / len(rows))


def test_constant_importance_changes_no_weight(language_models):
    model, spec = language_models["llama"]
    found = []
    for weights in (None, TokenImportance("norm", minimum=1.0)):
        walk = walk_of(copy.deepcopy(model), spec, "llama")
        compressor = Gptq(3, "channel")
        compressor.begin(matrices(walk))
        for _ in compressed_blocks(walk, compressor, token_weights=weights):
            pass
        found.append(walk.model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


def test_what_is_refused_by_name(language_models):
    model, spec = language_models["llama"]
    walk = walk_of(eager(model), spec, "llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0: it never calls .*attn_implementation='sdpa'"):
        TokenImportance()(next(iter(walk)))
    walk = walk_of(model, spec, "llama")
    walk.masks = lambda batch, names: dict.fromkeys(names, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"model\.layers\.0: a mask of \(2, 5\) does not fit"):
        TokenImportance("norm")(next(iter(walk)))
    walk = walk_of(model, spec, "llama")
    walk.batches = [{"tokens": ids} for ids in walk.batches]
    walk.forward = lambda batch: model(input_ids=batch["tokens"], use_cache=False)
    with pytest.raises(ValueError, match="no token ids under 'input_ids': set ids"):
        TokenImportance("frequency")(next(iter(walk)))
    assert len(TokenImportance("frequency", ids="tokens")(next(iter(walk)))) == 2
    walk.batches = [{"tokens": batch["tokens"], "short": batch["tokens"][:, :4]} for batch in walk.batches]
    with pytest.raises(ValueError, match=r"'short' of \(2, 4\) are not those of tower 'text' with .* \(2, 6, 8\)"):
        TokenImportance("frequency", ids="short")(next(iter(walk)))
    *_, decoder = walk_of(*language_models["t5"], "t5")
    with pytest.raises(ValueError, match=r"decoder\.block\.1: tower 'decoder' reads other tokens than 'encoder'"):
        TokenImportance("frequency")(decoder)
    for wrong, options in (
        ("kind='size'", {"kind": "size"}),
        ("chunks=None", {"kind": "chunks"}),
        ("runs are numbered", {"kind": "chunks", "chunks": "9_3"}),
        ("power='sqrt'", {"kind": "change", "power": "sqrt"}),
        ("only one of", {"masking": 0.1, "num_bins": 3}),
    ):
        with pytest.raises(ValueError, match=wrong):
            TokenImportance(**options)


def test_rolled_copies_show_every_token_at_all_places():
    ids = torch.arange(16).view(2, 8)
    found = rolled_copies(ids, 4)
    assert found.shape == (8, 8)
    assert found[0].tolist() == list(range(8))
    assert found[1].tolist() == [6, 7, 0, 1, 2, 3, 4, 5]
    assert found[4].tolist() == list(range(8, 16))
    assert torch.equal(rolled_copies(ids, 1), ids)
    assert all(sorted(row.tolist()) == sorted(ids[number // 4].tolist()) for number, row in enumerate(found))
    with pytest.raises(ValueError, match="copies=9: expected 1 to 8"):
        rolled_copies(ids, 9)


def test_attention_of_modules_outside_any_library():
    class OwnAttention(nn.Module):
        """Attention without a mask, of one head."""

        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]

    model = nn.Sequential(OwnAttention(), OwnAttention()).eval()
    walk = LayerWalk(model, ModelSpec((Tower("all", r"\d", 2, 4),)), [torch.randn(3, 5, 4)], model)
    for block in walk:
        x = block.inputs[0]
        q, k, _ = block.module.qkv(x).chunk(3, -1)
        mass = (q @ k.mT / 2).softmax(-1).sum(1).detach()
        torch.testing.assert_close(TokenImportance()(block)[0], token_shares(token_weights(mass)))


@pytest.mark.parametrize("kind", ["norm", "change", "frequency", "centroids"])
def test_what_fails_on_one_rank_is_told_to_all(kind, language_models, on_ranks):
    model, spec = language_models["llama"]

    def work(ranks):
        batches = [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(ranks.rank))]
        walk = walk_of(copy.deepcopy(model), spec, "llama", ranks=ranks, batches=batches)
        if ranks.rank:
            walk.masks = lambda batch, names: dict.fromkeys(names, torch.ones(2, 5))
        return TokenImportance(kind, num_centroids=3)(next(iter(walk)))

    first, second = on_ranks(2, work)
    assert "rank 1 failed: ValueError: model.layers.0: a mask of (2, 5) does not fit" in str(first)
    assert str(second).startswith("model.layers.0: a mask of (2, 5)")


@pytest.mark.parametrize(("kind", "why"), [("attention", "it never calls"), ("norm", "is not finite")])
def test_what_cannot_be_measured_on_one_rank_is_told_to_all(kind, why, language_models, on_ranks):
    model, spec = language_models["llama"]

    def work(ranks):
        own = eager(model) if ranks.rank and kind == "attention" else copy.deepcopy(model)
        ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(ranks.rank))
        walk = walk_of(own, spec, "llama", ranks=ranks, batches=[ids])
        block = next(iter(walk))
        if ranks.rank and kind == "norm":
            block.inputs[0][0, 0] = torch.nan
        return TokenImportance(kind)(block)

    first, second = on_ranks(2, work)
    assert str(first).startswith("rank 1 failed: ValueError: model.layers.0: ")
    assert why in str(first)
    assert str(second).startswith("model.layers.0: ")
