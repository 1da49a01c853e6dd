"""What the sections on retrieval say, and which examples they choose."""

import pytest

from fulgurite.reports.retrieval import chosen, sections_of_retrieval

WAYS = ("text_to_video", "video_to_text")


def figures(recall, domains=()):
    found = {f"{way}/{name}": recall for way in WAYS for name in ("R@1", "R@5", "R@10", "MdR", "MnR")}
    return found | {f"{way}/R@1/{domain}": recall + i for way in WAYS for i, domain in enumerate(domains)}


def results(**changes):
    variants = {"one": figures(10.0, "ab"), "one+two": figures(20.0, "ab"), "one+two+normalized": figures(30.0, "ab")}
    own = {"variants": variants, "levels": ["one", "two"], "normalizer": "Sinkhorn", "mode": "single-query"}
    return own | {"videos": 50, "captions": 100, "domains": ["a", "b"]} | changes


def answer(caption, rank):
    return {"id": caption, "domain": "a", "caption": caption, "rank": rank, "top": []}


def test_rows_are_levels_and_chance_and_domains_have_a_table():
    table, domains, examples = sections_of_retrieval(results(), [answer("a <b>", 1.0)], [])
    for cell in ("<td>1</td>", "<td>1 + 2</td>", "<td>1 + 2, normalised</td>", "<td>chance</td>", "<td>2.0</td>"):
        assert cell in table.html  # chance: 1 of 50 videos
    assert "<td>25.5</td>" in table.html
    assert "standard error of 5.0 points" in table.html
    assert "single query can be scored" in table.html or "so that a query can be scored alone" in table.html
    assert "<td>31.0</td>" in domains.html
    assert "a &lt;b&gt;" in examples.html


def test_one_domain_has_no_table_of_its_own_and_modes_keep_their_names():
    one = results(variants={"dynamic merging *": figures(10.0)}, domains=["a"], normalizer=None, mode=None)
    table, examples = sections_of_retrieval(one, [], [])
    assert "<td>dynamic merging *</td>" in table.html
    assert examples.html == ""


@pytest.mark.parametrize("number", [3, 8])
def test_outcomes_take_turns_among_the_examples(number):
    answers = [answer(f"{rank} {i}", rank) for rank in (1.0, 3.0, 7.5, 40.0) for i in range(3)]
    found = chosen(answers, number)
    assert [name for name, _ in found] == (
        ["found first", "among the first five", "among the first ten"]
        + ["further down"]
        + ["found first", "among the first five", "among the first ten", "further down"]
    )[:number]
    assert chosen(answers[::-1], number) == found
