"""Metrics of texts on two processes, of which one has fewer samples, repeats, or none."""

import json

import pytest

from fulgurite.metrics.answer_accuracy import AnswerAccuracy
from fulgurite.metrics.captions import CaptionScores
from fulgurite.metrics.glue import GlueScores
from fulgurite.metrics.vqa_official import VQASoftAccuracy

SAID = [["a dog runs", "the brown dog"], ["two men", "two men on a bus"], ["a cät sleeps on it"], ["a plate of food"]]
GIVEN = ["a dog", "men on a bus", "a cät", "food"]
CASES = {
    "vqa": (["red", "2", "no", "a bus"], [["red"] * 2 + ["blue"], ["two", "2"], ["no"], ["bus", "bus", "x"]]),
    "answers": (["a", "b", "c", "d"], [{"a": 1.0}, {"b": 0.3}, {"d": 1.0}, {"d": 1.0}]),
    "captions": (GIVEN, SAID),
    "cola": (["1", "0", "1", "x"], ["1", "1", "1", "0"]),
    "stsb": (["1.0", "2.2", "5.0", "x"], ["1.2", "3.0", "4.4", "0.0"]),
}


def metrics():
    return {
        "vqa": VQASoftAccuracy(),
        "answers": AnswerAccuracy(),
        "captions": CaptionScores(),
        "cola": GlueScores("cola"),
        "stsb": GlueScores("stsb"),
    }


def figures(metric):
    return {name: value.item() for name, value in metric.compute().items()}


SCRIPT = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from test_text_metrics_ranks import CASES, figures, metrics

dist.init_process_group("gloo")
told = []
for split in (1, 0):
    mine = slice(0, split) if dist.get_rank() == 0 else slice(split, None)
    found = {{}}
    for name, metric in metrics().items():
        metric.to("cpu")
        given, right = (values[mine] for values in CASES[name])
        if given:
            metric.update(given, right)
            repeats = torch.zeros(len(given), dtype=torch.bool)
            metric.update(given, right, counted=repeats)
        found[name] = figures(metric)
        metric.reset()
    told.append(found)
print(json.dumps(told))
"""


def test_two_processes_have_the_figures_of_one(pair, tmp_path):
    script = tmp_path / "texts.py"
    script.write_text(SCRIPT.format(folder=str(__file__).rpartition("/")[0]))
    expected = {}
    for name, metric in metrics().items():
        metric.update(*CASES[name])
        expected[name] = pytest.approx(figures(metric), rel=1e-9)
    for text in pair.run(script):
        assert json.loads(text.splitlines()[-1]) == [expected] * 2


def test_a_metric_begins_anew_after_reset():
    for name, metric in metrics().items():
        metric.update(*CASES[name])
        once = figures(metric)
        metric.reset()
        metric.update(*CASES[name])
        assert figures(metric) == once
