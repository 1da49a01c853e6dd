"""The loop that pruning and quantization share: what changes, what does not, and what is told of it."""

import copy
import logging

import pytest
import torch
from torch import nn

from fulgurite.methods.compression import LayerReport, compressed_blocks, left_dense, matrices, matrix, put, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.structure import ModelSpec, Tower

COMPRESSORS = [
    Magnitude(0.5),
    Magnitude(0.5, scope="global"),
    Wanda(0.5),
    SparseGpt(0.5),
    SparseGpt(0.5, sequential=True),
    Rtn(4),
    Gptq(4),
    Gptq(4, sequential=False),
]
IDENTITIES = [Magnitude(0.0), Magnitude(0.0, scope="global"), Wanda(0.0), SparseGpt(0.0), Rtn(16), Gptq(16)]


def ids(count=2):
    return [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def walk_over(model, spec, name):
    answers = (lambda batch: {"labels": batch}) if name == "t5" else (lambda batch: {})
    return LayerWalk(model, spec, ids(), lambda batch: model(input_ids=batch, use_cache=False, **answers(batch)))


def run(model, spec, name, compressor, **options):
    """A compressed copy, and its blocks."""
    own = copy.deepcopy(model)
    walk = walk_over(own, spec, name)
    compressor.begin(matrices(walk))
    return own, list(compressed_blocks(walk, compressor, **options))


def label(compressor):
    return f"{type(compressor).__name__}-{compressor.sequential}"


def same(one, two):
    return one.numpy().tobytes() == two.numpy().tobytes()


@pytest.mark.parametrize("compressor", IDENTITIES, ids=label)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_asked_for_changes_no_bit(name, compressor, language_models):
    model, spec = language_models[name]
    own, blocks = run(model, spec, name, compressor)
    assert all(map(same, own.state_dict().values(), model.state_dict().values()))
    reports = [report for done in blocks for report in done.reports.values()]
    assert {(report.error, report.bits, report.kept, report.sparsity) for report in reports} == {(0.0, None, 0.0, 0.0)}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=label)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_told_is_what_lies_in_the_model_and_all_else_is_as_it_was(name, compressor, language_models):
    model, spec = language_models[name]
    own, blocks = run(model, spec, name, compressor)
    results = {layer: result for done in blocks for layer, result in done.results.items()}
    inside = [n for n, each in model.named_modules() if isinstance(each, nn.Linear) and n != "lm_head"]
    assert sorted(results) == sorted(inside)
    assert [done.block.name for done in blocks] == spec.all_block_names(model)
    before, after = model.state_dict(), own.state_dict()
    for tensor, value in after.items():
        layer = tensor.removesuffix(".weight")
        assert same(value, results[layer].weight if layer in results else before[tensor]), tensor
        assert layer not in results or not same(value, before[tensor])


@pytest.mark.parametrize("compressor", [SparseGpt(0.5), Gptq(4, sequential=False)], ids=label)
def test_layers_that_come_later_see_earlier_ones_only_where_asked(compressor, language_models):
    model, spec = language_models["llama"]
    first = copy.copy(compressor)
    one, _ = run(model, spec, "llama", first)
    second = copy.copy(compressor)
    second.sequential = True
    two, _ = run(model, spec, "llama", second)
    differ = [
        name
        for name in matrices(walk_over(one, spec, "llama"))
        if not torch.equal(one.get_submodule(name).weight, two.get_submodule(name).weight)
    ]
    head = "model.layers.0"
    assert not any(name.startswith(f"{head}.self_attn") and not name.endswith("o_proj") for name in differ)
    assert {f"{head}.self_attn.o_proj", f"{head}.mlp.down_proj", "model.layers.1.self_attn.q_proj"} <= set(differ)


@pytest.mark.parametrize("compressor", [SparseGpt(0.5), Gptq(4)], ids=label)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_run_that_goes_on_comes_to_the_same_bits(name, compressor, language_models):
    model, spec = language_models[name]
    whole, blocks = run(model, spec, name, compressor)
    known = {done.block.name: done.results for done in blocks[: len(blocks) // 2 + 1]}
    again, rest = run(model, spec, name, compressor, done=known.get)
    assert [bool(done.reports) for done in rest] == [done.block.name not in known for done in blocks]
    assert all(map(same, again.state_dict().values(), whole.state_dict().values()))
    told = [{**report.data(), "seconds": 0} for done in blocks for report in done.reports.values()]
    rest_told = [{**report.data(), "seconds": 0} for done in rest for report in done.reports.values()]
    assert told[-len(rest_told) :] == rest_told


class Chain(nn.Module):
    """Blocks of all kinds of layers: a linear one that stores (in, out), convolutions, packed experts."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.blocks = nn.ModuleList(
            nn.ModuleDict({"turned": Conv1D(6, 4), "back": nn.Linear(6, 4), "mixed": nn.Conv1d(4, 4, 1, groups=2)})
            for _ in range(2)
        )
        for block in self.blocks:
            block.experts = nn.Parameter(torch.randn(2, 4, 4))
            block.forward = lambda x, b=block: b["mixed"]((x + b["back"](b["turned"](x).relu())).mT).mT @ b.experts[0]
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SPEC = ModelSpec((Tower("chain", r"blocks\.\d+", 2, 4),))


@pytest.fixture
def chain():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Chain().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    rows = [torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    return LayerWalk(model, SPEC, rows, model)


def test_what_is_no_linear_layer_is_told_once_and_left(chain, caplog):
    before = {name: each.clone() for name, each in chain.model.state_dict().items()}
    with caplog.at_level(logging.INFO, "fulgurite.methods.compression"):
        done = list(compressed_blocks(chain, Wanda(0.5)))
    (record,) = caplog.records
    expected = ["2 x blocks.*.experts (ModuleDict [2, 4, 4])", "2 x blocks.*.mixed.weight (Conv1d [4, 2, 1])"]
    assert left_dense(chain) == expected
    assert record.getMessage().endswith("; ".join(expected))
    names = [name for each in done for name in each.results]
    assert names == [f"blocks.{i}.{name}" for i in range(2) for name in ("turned", "back")]
    for name, tensor in chain.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.removesuffix(".weight") not in names)


def test_a_turned_weight_is_compressed_along_its_inputs(chain):
    layer = chain.model.blocks[0]["turned"]
    before = layer.weight.detach().clone()  # (in, out)
    rows = torch.cat(chain.batches).flatten(0, 1)
    expected = torch.empty_like(before)
    for column, weights in enumerate(before.T):
        scores = weights.abs() * rows.square().mean(0).sqrt()
        expected[:, column] = weights.where(scores >= scores.sort().values[2], 0)
    next(compressed_blocks(chain, Wanda(0.5)))
    assert torch.equal(layer.weight, expected)
    put(layer, matrix(layer) * 2)
    assert torch.equal(layer.weight, expected * 2)


def test_errors_are_those_of_outputs(chain):
    """tr(D G D^T) against squared differences of the outputs themselves, in the first block's layers."""
    model = copy.deepcopy(chain.model)
    first = next(compressed_blocks(chain, SparseGpt(0.5)))
    rows = torch.cat(chain.batches).flatten(0, 1)
    inputs = {"turned": rows, "back": model.blocks[0]["turned"](rows).relu()}
    for name, x in inputs.items():
        weight, report = matrix(model.blocks[0][name]), first.reports[f"blocks.0.{name}"]
        change = x @ (weight - first.results[f"blocks.0.{name}"].weight).T
        assert report.error == pytest.approx((change.square().sum() / (x @ weight.T).square().sum()).item(), rel=1e-9)
        assert (report.tower, report.block, report.shape) == ("chain", "blocks.0", tuple(weight.shape))
        assert report.sparsity == (first.results[f"blocks.0.{name}"].weight == 0).double().mean().item() == 0.5
        assert LayerReport.from_data(report.data()) == report


def test_token_weights_weigh_the_moments(chain):
    weights = [torch.rand(2, 5, generator=torch.Generator().manual_seed(i)) for i in (5, 6)]
    seen = {}

    class Noting(SparseGpt):
        def compress(self, name, weight, moment):
            seen[name] = moment
            return super().compress(name, weight, moment)

    next(compressed_blocks(chain, Noting(0.5), token_weights=lambda block: weights))
    rows, shares = torch.cat(chain.batches).flatten(0, 1), torch.cat(weights).flatten().double()
    expected = torch.einsum("t,ti,tj->ij", shares, rows, rows) / shares.sum()
    torch.testing.assert_close(seen["blocks.0.turned"], expected, rtol=1e-9, atol=1e-12)


def test_layers_are_chosen_by_pattern(chain):
    assert list(matrices(chain, r".*\.back")) == ["blocks.0.back", "blocks.1.back"]
    assert [list(done.results) for done in compressed_blocks(chain, Wanda(0.5), r"blocks\.1\.back")] == [
        [],
        ["blocks.1.back"],
    ]
    with pytest.raises(ValueError, match=r"layers='.*nothing' matches no linear layer of \['chain'\]"):
        matrices(chain, r".*nothing")
    with pytest.raises(ValueError, match=r"blocks\.0: ModuleDict is no linear layer"):
        matrices(chain, r"blocks\..*")


def test_one_tensor_of_two_layers_is_refused(chain):
    chain.model.blocks[1]["back"].weight = chain.model.blocks[0]["back"].weight
    with pytest.raises(ValueError, match=r"blocks\.0\.back and blocks\.1\.back are one tensor"):
        matrices(chain)


def test_one_tensor_of_a_layer_and_something_outside_the_blocks_is_refused(chain):
    chain.model.table = nn.Embedding(4, 6)
    chain.model.table.weight = chain.model.blocks[0]["back"].weight
    with pytest.raises(ValueError, match=r"blocks\.0\.back and table are one tensor"):
        matrices(chain)
    assert len(matrices(chain, r".*\.turned")) == 2


def test_a_layer_that_cannot_be_compressed_is_named(chain):
    with torch.no_grad():
        chain.model.blocks[1]["back"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^blocks\.1\.back: .*NaN"):
        list(compressed_blocks(chain, Rtn(4)))


def test_totals_are_means_over_entries():
    def report(shape, sparsity, bits, kept):
        return LayerReport("a", "t", "b", shape, sparsity, bits, kept, 0.0, None, 0.0)

    found = totals([report((2, 3), 0.5, None, 0.0), report((4, 5), 0.25, 4, 0.1)])
    assert found == pytest.approx(
        {"sparsity": (6 * 0.5 + 20 * 0.25) / 26, "bits": (6 * 16 + 20 * (4 * 0.9 + 32 * 0.1)) / 26}
    )


def test_packed_experts_stay_as_they_are_and_are_told():
    """The experts and the router of a Mixtral are no modules with a matrix; its attention is compressed."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_local_experts": 3}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = MixtralConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **sizes)
        model = MixtralForCausalLM(config).eval()
    spec = ModelSpec((Tower("text", r"model\.layers\.\d+", 2, 8),))
    own, blocks = run(model, spec, "mixtral", SparseGpt(0.5))
    names = [name for done in blocks for name in done.results]
    assert sorted(names) == sorted(f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo")
    assert [text.partition(" (")[0] for text in left_dense(walk_over(own, spec, "mixtral"))] == [
        f"2 x model.layers.*.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    ]
    for name, tensor in own.state_dict().items():
        assert same(tensor, model.state_dict()[name]) == (name.removesuffix(".weight") not in names)
    with pytest.raises(ValueError, match=r"mlp\.experts: MixtralExperts is no linear layer.*leave it out"):
        matrices(walk_over(own, spec, "mixtral"), r".*\.(experts|[qkvo]_proj)")
