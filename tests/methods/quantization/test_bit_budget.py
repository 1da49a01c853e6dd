import copy
import itertools

import pytest
import torch

from fulgurite.methods.compression import compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.bit_budget import BitBudget
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rtn import Rtn, quantize_rtn


def case(language_models, ranks=None, batches=None):
    model, spec = language_models["llama"]
    model = copy.deepcopy(model)
    if batches is None:
        batches = [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    extra = {} if ranks is None else {"ranks": ranks}
    return LayerWalk(model, spec, batches, lambda ids: model(input_ids=ids, use_cache=False), **extra)


PATTERN = r".*\.0\.self_attn\.[qkvo]_proj"


def inputs_of(walk, names):
    """All rows that go into each layer."""
    rows = {name: [] for name in names}
    hooks = [
        walk.model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in walk.batches:
            walk.forward(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in rows.items()}


def test_errors_are_those_of_the_outputs_and_bits_the_best_of_all_choices(language_models):
    walk = case(language_models)
    budget = BitBudget(3.0, (2, 3, 4, 8), measure="rounding")
    quantizer = Gptq(4, "channel")
    errors = budget.errors(walk, quantizer, PATTERN)
    weights = matrices(walk, PATTERN)
    for name, rows in inputs_of(walk, weights).items():
        for bits in budget.choices:
            rounded = quantize_rtn(weights[name], bits, "channel", "symmetric").weight
            change = (rows @ (rounded - weights[name]).T).square().sum() / (rows @ weights[name].T).square().sum()
            assert errors[name][bits] == pytest.approx(change.item(), rel=1e-6)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    found = budget.bits(walk, quantizer, PATTERN)
    best = min(
        (sum(errors[n][b] for n, b in zip(sizes, each)), each)
        for each in itertools.product(budget.choices, repeat=len(sizes))
        if sum(sizes[n] * b for n, b in zip(sizes, each)) <= 3 * sum(sizes.values())
    )
    assert sum(errors[name][bits] for name, bits in found.items()) == pytest.approx(best[0])
    assert BitBudget(2, (2, 4)).allocate(walk, errors, PATTERN) == dict.fromkeys(sizes, 2)


@pytest.mark.parametrize("quantizer", [Gptq(4, "channel"), Rtn(4, "channel")], ids=["gptq", "rtn"])
def test_the_model_stays_and_the_quantizer_takes_the_bits(quantizer, language_models):
    walk = case(language_models)
    before = {name: tensor.clone() for name, tensor in walk.model.state_dict().items()}
    bits = BitBudget(3.5, (2, 3, 4, 8)).bits(walk, quantizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in walk.model.state_dict().items())
    assert len({quantizer.bits_of(name) for name in bits}) == 1
    quantizer.assign(bits)
    quantizer.begin(matrices(walk))
    reports = [report for block in compressed_blocks(walk, quantizer) for report in block.reports.values()]
    assert {report.name: report.bits for report in reports} == bits
    assert 3 < totals(reports)["bits"] <= 3.5


def test_two_ranks_find_what_one_does_and_no_data_counts_weights(language_models, on_ranks):
    walk = case(language_models)
    method = BitBudget(3.0, (2, 3, 4))
    alone = method.errors(walk, Gptq(4, "channel"), PATTERN)

    def work(ranks):
        return method.errors(case(language_models, ranks, walk.batches[ranks.rank :: 2]), Gptq(4, "channel"), PATTERN)

    for found in on_ranks(2, work):
        assert {n: pytest.approx(e, rel=1e-6) for n, e in found.items()} == alone
    walk = case(language_models, batches=[])
    for name, errors in method.errors(walk, Rtn(4, "channel"), PATTERN).items():
        weight = matrices(walk)[name]
        change = (quantize_rtn(weight, 3, "channel", "symmetric").weight - weight).square().sum()
        assert errors[3] == pytest.approx((change / weight.square().sum()).item())
    with pytest.raises(ValueError, match="no calibration data for Gptq: choose measure='rounding'"):
        method.errors(walk, Gptq(4))


def test_what_is_refused():
    for wrong, options in (
        ("below the fewest", {"average_bits": 1.5}),
        (r"choices=\[9\]", {"average_bits": 10, "choices": [9]}),
        ("measure='loss'", {"average_bits": 3, "measure": "loss"}),
    ):
        with pytest.raises(ValueError, match=wrong):
            BitBudget(**options)
