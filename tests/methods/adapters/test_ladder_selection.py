"""The selection against a version with Python sets and loops, and its laws."""

import pytest
import torch

from fulgurite.methods.adapters.ladder_selection import (
    Norm,
    Together,
    Units,
    column_units,
    kept_heads_first,
    kept_units,
    prune,
    stream_units,
)

D, HEADS, HEAD, FF, R = 24, 3, 8, 48, 4
PARTS = [
    Norm(("n1.weight", "n1.bias")),
    Together(("q", "k", "v"), heads=HEADS),
    Together(("o",), writes=True),
    Norm(("n2.weight", "n2.bias")),
    Together(("wi_0", "wi_1")),
    Together(("wo",), writes=True),
]
SIZES = {"q": 6, "k": 6, "v": 6, "o": 6, "wi_0": 12, "wi_1": 12, "wo": 6}


def block(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys(("q", "k", "v", "o"), (D, D)) | {"wi_0": (FF, D), "wi_1": (FF, D), "wo": (D, FF)}
    out = {f"{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()}
    out |= {"q.bias": torch.randn(D, generator=g)}
    return out | {f"n{i}.{t}": torch.randn(D, generator=g) for i in (1, 2) for t in ("weight", "bias")}


def slow(weights, importance, read, order):
    """What the specification says of version 2, one number at a time."""
    out = {}

    def keep(scores, count):
        gone = sorted(range(len(scores)), key=lambda i: scores[i])[: len(scores) - count]
        kept = list(set(range(len(scores))) - set(gone))
        return sorted(kept) if order == "ascending" else kept

    def together(names, count, read):
        scores = []
        for row in range(weights[f"{names[0]}.weight"].shape[0]):
            total = 0.0
            for column in read:
                product = 1.0
                for name in names:
                    product *= float(importance[f"{name}.weight"][row, column])
                total += abs(product)
            scores.append(total)
        rows = keep(scores, count)
        for name in names:
            out[f"{name}.weight"] = torch.stack([weights[f"{name}.weight"][i, read] for i in rows])
            if f"{name}.bias" in weights:
                out[f"{name}.bias"] = torch.stack([weights[f"{name}.bias"][i] for i in rows])
        return rows

    for t in ("weight", "bias"):
        out[f"n1.{t}"] = weights[f"n1.{t}"][read]
    read = together(["q", "k", "v"], 6, read)
    read = together(["o"], 6, read)
    for t in ("weight", "bias"):
        out[f"n2.{t}"] = weights[f"n2.{t}"][read]
    read = together(["wi_0", "wi_1"], 12, read)
    return out, together(["wo"], 6, read)


@pytest.mark.parametrize("order", ["ascending", "official"])
def test_agrees_with_sets_and_loops(order):
    weights, importance = block(0), {n: t**2 for n, t in block(1).items()}
    read = [int(i) for i in torch.randperm(D, generator=torch.Generator().manual_seed(2))[:6]]
    expected, last = slow(weights, importance, read, order)
    found, units = prune(weights, importance, PARTS, SIZES, Units(torch.tensor(read)), order)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert units.last.tolist() == last


def test_official_order_is_not_ascending():
    scores = torch.zeros(200)
    scores[[3, 70, 133, 199]] = torch.tensor([1.0, 2, 3, 4])
    kept = kept_units(scores, 4, "official").tolist()
    assert kept == list({*range(200)} - ({*range(200)} - {3, 70, 133, 199}))
    assert sorted(kept) == kept_units(scores, 4).tolist() == [3, 70, 133, 199] != kept


def test_products_of_tiny_importances_still_rank():
    weights = block(0)
    importance = {n: t**2 * 1e-14 for n, t in block(1).items()}
    larger = {n: t * 1e14 for n, t in importance.items()}
    start = Units(torch.arange(6))
    tiny, _ = prune(weights, importance, PARTS, SIZES, start)
    plain, _ = prune(weights, larger, PARTS, SIZES, start)
    assert all(torch.equal(tiny[name], plain[name]) for name in plain)


def test_ties_keep_the_lowest_index():
    assert kept_units(torch.tensor([1.0, 2, 1, 2, 1, 1]), 4).tolist() == [0, 1, 2, 3]
    assert column_units(torch.ones(5, 7), 3).tolist() == [0, 1, 2]


def test_whole_heads_go_first():
    scores = torch.tensor([9.0, 0, 0, 4, 4, 4, 1, 1, 1])  # heads sum to 9, 12 and 3
    assert kept_heads_first(scores, 3, 3).tolist() == [3, 4, 5]
    assert kept_heads_first(scores, 5, 3).tolist() == [0, 1, 3, 4, 5]
    assert kept_heads_first(scores, 9, 3).tolist() == list(range(9))


@pytest.mark.parametrize(("keep", "scores"), [(0, [1.0, 2]), (3, [1.0, 2]), (1, [1.0, float("nan")])])
def test_refuses_what_cannot_be_kept(keep, scores):
    with pytest.raises(ValueError, match=r"cannot be kept|not finite"):
        kept_units(torch.tensor(scores), keep)


def test_grouped_queries_stay_with_their_keys():
    # 2 key heads of 4, 3 query heads each: rows carry their (head, inside) as values.
    rows_q = torch.tensor([[10.0 * head + i for i in range(4)] for head in range(6)]).reshape(-1, 1)
    weights = {"q.weight": rows_q, "k.weight": torch.arange(8.0)[:, None], "v.weight": torch.ones(8, 1)}
    importance = {"q.weight": torch.ones(24, 1), "k.weight": torch.tensor([[1.0, 5, 6, 1, 7, 1, 1, 8]]).T}
    importance["v.weight"] = torch.ones(8, 1)
    part = Together(("q", "k", "v"), heads=2, groups=3)
    found, units = prune(weights, importance, [part], {"q": 12, "k": 4, "v": 4}, Units(torch.tensor([0])))
    assert found["k.weight"].flatten().tolist() == [1, 2, 4, 7]  # inside 1, 2 of head 0; 0, 3 of head 1
    assert found["q.weight"].flatten().tolist() == [1, 2, 11, 12, 21, 22, 30, 33, 40, 43, 50, 53]
    assert units.last.tolist() == [1, 2, 5, 6, 9, 10, 12, 15, 16, 19, 20, 23]


def test_one_weight_for_queries_keys_and_values_is_three():
    weights, importance = block(0), block(1)
    stacked = {"qkv.weight": torch.cat([weights[f"{n}.weight"] for n in "qkv"])}
    scores = {"qkv.weight": torch.cat([importance[f"{n}.weight"] for n in "qkv"])}
    start = Units(torch.arange(0, D, 4))
    one, units = prune(stacked, scores, [Together(("qkv",), fused=3)], {"qkv": 18}, start)
    three, same = prune(weights, importance, PARTS[1:2], SIZES, start)
    assert torch.equal(one["qkv.weight"], torch.cat([three[f"{n}.weight"] for n in "qkv"]))
    assert torch.equal(units.last, same.last)


def test_consistent_rule_has_one_choice_for_the_stream():
    weights, importance = block(0), block(1)
    stream = stream_units(importance, PARTS, 6)
    found, units = prune(weights, importance, PARTS, SIZES, Units(stream, stream=stream))
    assert torch.equal(units.last, stream)
    assert torch.equal(found["n1.weight"], weights["n1.weight"][stream])
    assert torch.equal(found["n2.weight"], weights["n2.weight"][stream])
    votes = [importance[f"{n}.weight"].double().abs().sum(1) for n in ("o", "wo")]
    assert stream.tolist() == kept_units(sum(v / v.sum() for v in votes), 6).tolist()
