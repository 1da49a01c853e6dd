"""What every merger must do, whatever it computes. A new one is tested by adding it to a list in ``cases_*.py``."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from fulgurite.methods.merging.base import STATISTIC, survey
from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.plan import Matching, plan_of

HERE = Path(__file__).parent


def cases_of(path):
    """``CASES`` of one file: (merger, number of experts that it takes or None, whether one at weight 1 comes back)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


MERGERS = [case for path in sorted(HERE.glob("cases_*.py")) for case in cases_of(path)]
IDS = [f"{type(m).__name__}-{i}" for i, (m, _, _) in enumerate(MERGERS)]


@pytest.fixture(params=MERGERS, ids=IDS)
def case(request):
    return request.param


@pytest.fixture
def merger(case):
    return case[0]


@pytest.fixture
def sources(case, base, experts):
    """As many experts as the merger takes, and the base if it needs one."""
    _, number, _ = case
    return experts[:number], base if case[0].needs_base else None


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_names_shapes_types_are_the_references_and_inputs_stay(merger, sources):
    experts, base = sources
    before = copy.deepcopy((experts, base))
    merged = merger(experts, base)
    reference = experts[0] if base is None else base
    assert list(merged) == list(reference)
    assert all(merged[n].shape == t.shape and merged[n].dtype == t.dtype for n, t in reference.items())
    assert all(equal(a, b) for a, b in zip(experts, before[0]))
    assert base is None or equal(base, before[1])
    places = {t.data_ptr() for model in (*experts, base or {}) for t in model.values()}
    assert not places & {t.data_ptr() for t in merged.values()}


def test_one_expert_at_weight_one_comes_back_to_the_bit(case, merger, base, experts):
    _, number, returns = case
    if number is not None or not returns:
        pytest.skip("takes another number of experts, or scales by design")
    assert equal(merger(experts[:1], base if merger.needs_base else None), experts[0])


def test_experts_equal_to_the_base_give_it_back(merger, sources, base):
    experts, given = sources
    same = [copy.deepcopy(base) for _ in experts]
    merged = merger(same, None if given is None else base)
    if isinstance(merger, Average) and not merger.normalize:
        pytest.skip("a sum of equal models is a multiple")
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_order_of_names_changes_nothing(merger, sources):
    experts, base = sources
    turned = [dict(reversed(model.items())) for model in experts]
    merged, again = merger(experts, base), merger(turned, base and dict(reversed(base.items())))
    assert all(torch.equal(merged[n], again[n]) for n in merged)


def test_pieces_and_threads_change_nothing(merger, sources):
    experts, base = sources
    whole, plan, parts = merger(experts, base), plan_of(experts, base), []
    weights = merger.check(len(experts), base is not None, None)
    for threads in (1, 3):
        survey(merger, plan, threads, size=7)
        parts.append({n: torch.cat(list(merger.merge_one(plan.operands(n, 7), weights))) for n in plan.merged})
    for name, tensor in parts[0].items():
        assert torch.equal(tensor, parts[1][name])
        torch.testing.assert_close(tensor.view(whole[name].shape), whole[name], rtol=1e-6, atol=1e-6)


def test_a_second_merge_knows_nothing_of_the_first(merger, sources):
    experts, base = sources
    first = merger(experts, base)
    merger([{n: t * 2 if t.is_floating_point() else t for n, t in e.items()} for e in experts], base)
    assert equal(merger(experts, base), first)


def test_arithmetic_is_in_float32_and_the_result_in_the_references_type(merger, sources):
    experts, base = sources

    def half(model):
        return {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.items()}

    low = merger([half(e) for e in experts], base and half(base))
    high = merger(
        [{n: t.float() if t.is_floating_point() else t for n, t in half(e).items()} for e in experts],
        base and {n: t.float() if t.is_floating_point() else t for n, t in half(base).items()},
    )
    for name, tensor in low.items():
        assert tensor.dtype == (torch.bfloat16 if high[name].is_floating_point() else high[name].dtype)
        assert torch.equal(tensor, high[name].to(tensor.dtype))


def test_integers_are_copied_and_statistics_averaged(merger, sources):
    experts, base = sources
    merged = merger(experts, base)
    assert merged["bn.num_batches_tracked"] == 7
    assert torch.equal(merged["position_ids"], torch.arange(5))
    for name in filter(STATISTIC.search, merged):
        torch.testing.assert_close(merged[name], torch.stack([e[name] for e in experts]).mean(0))


def test_tied_tensors_are_merged_once_and_stay_tied(merger, sources):
    experts, base = sources
    for model in (*experts, *([] if base is None else [base])):
        model["tied.weight"] = model["embed.weight"]
    merged = merger(experts, base)
    assert merged["tied.weight"].data_ptr() == merged["embed.weight"].data_ptr()


def test_nan_in_a_source_is_named(merger, sources):
    experts, base = sources
    experts[-1]["block.0.mlp.weight"][2, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"expert {len(experts) - 1} holds NaN in block.0.mlp.weight"):
        merger(experts, base)


def test_all_that_does_not_fit_is_one_error(merger, sources):
    experts, base = sources
    if len(experts) < 2 and base is None:
        pytest.skip("nothing to differ from")
    del experts[-1]["scale"]
    experts[-1]["head.weight"] = torch.zeros(4, 7)
    experts[-1]["position_ids"] = torch.arange(5) + 1
    with pytest.raises(ValueError, match=r"in 3 entries[\s\S]*"):
        merger(experts, base)


def test_common_rows_and_missing_names_by_option(merger, sources):
    experts, base = sources
    if len(experts) < 2 and base is None:
        pytest.skip("nothing to differ from")
    experts[-1]["embed.weight"] = experts[-1]["embed.weight"][:7]
    dropped = experts[-1].pop("scale")
    with pytest.raises(ValueError, match='rows="common"'):
        merger(experts, base)
    merged = merger(experts, base, matching=Matching(strict=False, rows="common"))
    assert merged["embed.weight"].shape == (7, 6)
    assert torch.equal(merged["scale"], (experts[0] if base is None else base)["scale"])
    assert dropped is not merged["scale"]


def test_what_it_cannot_take_is_refused(merger, sources):
    experts, base = sources
    with pytest.raises(ValueError, match=r"2 weights for|1 weights for"):
        merger(experts, base, weights=[1.0] * (2 if len(experts) != 2 else 1))
    if merger.needs_base:
        with pytest.raises(ValueError, match="needs the base"):
            merger(experts)
    with pytest.raises(ValueError, match="at least"):
        merger([], base)
