"""The picture of scores against sizes in the report of a run."""

import re

import pytest
from torch import nn

from fulgurite.callbacks.tradeoff import tradeoff_sections
from fulgurite.checkpoints import read_manifest, save_checkpoint_folder


class Module(nn.Module):
    """100 numbers of a backbone, 20 beside it, and a buffer of 5."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(10, 10, bias=False), nn.Linear(10, 2, bias=False)
        self.register_buffer("counts", nn.Parameter(self.head.weight.detach()[0, :5].clone()).data)


def rows_of(section):
    found = re.findall(r"<tr.*?</tr>", section.html, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in found]
    return {row[0]: (row[1], row[2]) for row in cells[1:]}


@pytest.fixture
def artefacts(tmp_path):
    """A delta, what became of it, and an older one."""
    module, found = Module(), {}
    state = module.state_dict()
    base = {"source": "here", "digest": "none"}
    compressed = {"compressed": {"backbone.weight": {}}}
    for name, tensors, given, step, accuracy in (
        ("merged", {"head.weight": state["head.weight"]}, {"kind": "delta", "base": base}, 6, 0.5),
        ("pruned", state, {"facts": compressed}, 6, 0.4),
        ("quantized", {"backbone.weight": state["backbone.weight"].half()}, {"facts": compressed}, 6, 0.25),
        ("pruned before", state, {"facts": compressed}, 3, 0.3),
    ):
        save_checkpoint_folder(tmp_path / name, {"weights": tensors, "state": {"much": state["head.weight"]}}, **given)
        scores = {"val/accuracy": accuracy / 2, "test/accuracy": accuracy, "test/accuracy/red": 0.9}
        found[name] = (read_manifest(tmp_path / name), {"step": step, "scores": scores})
    return module, found, tmp_path


def test_a_point_is_what_the_weights_take_and_how_they_score(artefacts):
    module, found, folder = artefacts
    (section,) = tradeoff_sections(module, {"trained": {"test/accuracy": 0.6}}, found)
    size = {name: (folder / name / "weights.safetensors").stat().st_size for name in found}
    expected = {
        "trained": (4 * 125, "60"),
        "merged": (size["merged"] + 4 * 100, "50"),  # stands on the backbone
        "pruned": (size["pruned"], "40"),
        "quantized": (size["quantized"], "25"),
    }
    assert rows_of(section) == {name: (f"{num / 1e6:,.4g}", score) for name, (num, score) in expected.items()}
    assert section.html.count("<img") == 1
    assert "test accuracy, %" in section.html
    for _, entry in found.values():
        del entry["scores"]["test/accuracy"]
    (section,) = tradeoff_sections(module, {"trained": {"test/accuracy": 0.6}}, found)
    assert rows_of(section)["pruned"][1] == "20"
    assert "trained" not in rows_of(section)


def test_there_is_none_where_nothing_was_compressed(artefacts):
    module, found, _ = artefacts
    assert tradeoff_sections(module, {}, {"merged": found["merged"]}) == []
    assert tradeoff_sections(module, {}, {}) == []
    newer = {"merged": (found["merged"][0], {**found["merged"][1], "step": 9}), "pruned": found["pruned"]}
    assert tradeoff_sections(module, {}, newer) == []
