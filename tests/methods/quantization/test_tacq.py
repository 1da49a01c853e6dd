import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from fulgurite.methods.compression import compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.quantization.tacq import TaskCircuit, reference


def case(name, language_models, ranks=None, batches=None, model=None):
    """Walk over a fresh model, and its loss."""
    original, spec = language_models[name]
    model = copy.deepcopy(original) if model is None else model
    if batches is None:
        batches = [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def forward(ids):
        return model(input_ids=ids, **({"labels": ids} if name == "t5" else {}), use_cache=False).logits

    walk = LayerWalk(model, spec, batches, forward, **({} if ranks is None else {"ranks": ranks}))
    return walk, lambda ids: cross_entropy(forward(ids).flatten(0, 1), ids.flatten())


def quantized(walk, compressor):
    compressor.begin(matrices(walk))
    return [report for block in compressed_blocks(walk, compressor) for report in block.reports.values()]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_masks_are_those_of_the_published_steps_and_the_model_stays(name, language_models):
    walk, loss = case(name, language_models)
    before = {each: tensor.clone() for each, tensor in walk.model.state_dict().items()}
    quantizer = Gptq(2, "channel")
    found = TaskCircuit(0.05).masks(walk, loss, quantizer)
    assert all(torch.equal(tensor, before[each]) for each, tensor in walk.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in walk.model.parameters())

    other, _ = case(name, language_models)
    quantized(other, Gptq(2, "channel"))
    names = list(matrices(walk))
    parameters = [walk.model.get_submodule(each).weight for each in names]
    absolute = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in walk.batches:
        for row in batch:
            for total, gradient in zip(absolute, torch.autograd.grad(loss(row[None]), parameters)):
                total += gradient.abs()
    changes = [matrices(walk)[each] - matrices(other)[each] for each in names]
    scores = torch.cat([(a * c * w).abs().flatten() for a, c, w in zip(absolute, changes, parameters)])
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[scores.topk(int(0.05 * len(scores))).indices] = True
    assert torch.equal(torch.cat([found[each].flatten() for each in names]), expected)

    quantizer.keep(found)
    reports = quantized(walk, quantizer)
    kept = sum(report.kept * report.shape[0] * report.shape[1] for report in reports)
    assert kept == pytest.approx(int(0.05 * len(scores)))
    assert totals(reports)["bits"] == pytest.approx(2 * 0.95 + 32 * 0.05, abs=0.02)


def test_other_bits_and_ratios_need_no_new_gradients(language_models):
    walk, loss = case("llama", language_models)
    known = TaskCircuit().sensitivities(walk, loss)

    def never(batch):
        raise AssertionError("a backward pass")

    few, many = (TaskCircuit(ratio).masks(walk, never, Rtn(3), sensitivities=known) for ratio in (0.01, 0.1))
    assert not any((few[name] & ~many[name]).any() for name in few)
    again = TaskCircuit(0.1).masks(walk, lambda ids: 64 * loss(ids), Rtn(3))
    assert all(torch.equal(again[name], many[name]) for name in many)
    squares = TaskCircuit(moment="square").sensitivities(walk, loss)
    assert all((squares[name] >= known[name] ** 2 * (1 - 1e-9)).all() for name in known)


def test_opposite_gradients_add_and_order_does_not_matter(language_models):
    walk, loss = case("llama", language_models)
    (one, two) = walk.batches
    walk.batches = [torch.cat([one, two])]
    whole = TaskCircuit().sensitivities(walk, loss)
    walk.batches = [two.flip(0), one.flip(0)]
    for name, value in TaskCircuit().sensitivities(walk, loss).items():
        torch.testing.assert_close(value, whole[name])
    walk.batches = [one[:1]]
    single = TaskCircuit().sensitivities(walk, loss)
    signs = iter([1, -1, 1, -1])
    walk.batches = [one[:1].expand(4, -1)]
    for name, value in TaskCircuit().sensitivities(walk, lambda ids: next(signs) * loss(ids)).items():
        torch.testing.assert_close(value, single[name])


def test_16_bits_have_no_circuit_and_what_the_quantizer_keeps_does_not_count(language_models):
    walk, loss = case("llama", language_models)
    assert all(value is None for value in reference(walk, Gptq(16)).values())
    quantizer = Rtn(2)
    quantizer.keep({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in matrices(walk).items()})
    plain = reference(walk, quantizer)
    assert all(value.kept is None for value in plain.values())
    assert all(quantizer.kept_of(name, weight).all() for name, weight in matrices(walk).items())
    none = TaskCircuit(0.0).masks(walk, loss, quantizer)
    assert not any(mask.any() for mask in none.values())


def test_two_ranks_find_what_one_does(language_models, on_ranks):
    walk, loss = case("llama", language_models)
    alone = TaskCircuit(0.05).masks(walk, loss, Gptq(3, "channel"))

    def work(ranks):
        own, own_loss = case("llama", language_models, ranks, walk.batches[ranks.rank :: 2])
        return TaskCircuit(0.05).masks(own, own_loss, Gptq(3, "channel"))

    for found in on_ranks(2, work):
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_failing_walk_leaves_the_model_as_it_was(language_models):
    walk, loss = case("llama", language_models)
    before = {each: tensor.clone() for each, tensor in walk.model.state_dict().items()}

    class Failing(Rtn):
        def compress(self, name, weight, moment):
            if name.startswith("model.layers.1"):
                raise ValueError("enough")
            return super().compress(name, weight, moment)

    with pytest.raises(ValueError, match=r"model\.layers\.1\..*enough"):
        TaskCircuit().masks(walk, loss, Failing(2))
    assert all(torch.equal(tensor, before[each]) for each, tensor in walk.model.state_dict().items())


def test_what_is_refused():
    for wrong, options in (("ratio=2", {"ratio": 2}), ("samples=0", {"samples": 0}), ("moment", {"moment": "mean"})):
        with pytest.raises(ValueError, match=wrong):
            TaskCircuit(**options)
