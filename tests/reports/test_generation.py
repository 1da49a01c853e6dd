"""Figures by task and kind, and examples of which tasks take turns."""

import torch

from fulgurite.reports.generation import sections_of_generation
from fulgurite.samples import Sample

RESULTS = {
    "tasks": ["vqa", "caption"],
    "figures": {"score": 61.25, "accuracy/vqa": 50.0, "accuracy/vqa/yes/no": 75.0, "CIDEr/caption": 72.5},
}


def answer(number, task, credit, text="red"):
    gold = {"red": 1.0, "dark": 0.3} if task == "vqa" else {"a red thing": 1.0}
    row = {"id": str(number), "domain": f"{task} set", "task": task, "kind": None, "gold": gold, "answer": text}
    return {**row, "credit": credit}


ANSWERS = [
    answer(0, "vqa", 1.0),
    answer(1, "vqa", 0.3, "dark"),
    answer(2, "vqa", 0.0, "<none>"),
    answer(3, "caption", None, "a blue thing"),
    answer(4, "caption", None, "a thing"),
]


def test_the_table_has_figures_by_task_and_by_kind():
    (table,) = sections_of_generation(RESULTS, [], [])
    for cell in ("mean of the tasks", "61.25", "CIDEr", "72.50", "yes/no", "accuracy 75.00"):
        assert cell in table.html


def test_examples_show_pictures_what_is_right_and_what_was_written():
    pictures = (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 200, dtype=torch.uint8))
    samples = [
        Sample(id="0", domain="vqa set", task="vqa", question="what colour & shape?", image=pictures[0]),
        Sample(id="3", domain="caption set", task="caption", question="", images=pictures),
    ]
    _, examples = sections_of_generation(RESULTS, ANSWERS, samples)
    html = examples.html
    assert html.count("<article") == 5
    assert html.count("<img") == 3
    assert "what colour &amp; shape?" in html
    assert '<span class="right">✓ red</span>' in html
    assert '<span class="right">✓ dark (30 %)</span>' in html
    assert '<span class="wrong">✗ &lt;none&gt;</span>' in html
    assert '<span class="">a blue thing</span>' in html
    assert html.index("Sample 4") > 0
    first_two = [html.index("vqa · "), html.index("caption · ")]
    assert first_two == sorted(first_two)
