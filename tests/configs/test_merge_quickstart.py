"""The quickstart merged by five methods, tiny: one table of all, beside dynamic merging."""

import json

import pytest

from fulgurite.checkpoints import audit

METHODS = {"average", "task_arithmetic", "ties", "tsv_m", "opcm"}


def test_five_merges_are_scored_beside_dynamic_merging(command, configs, tmp_path, capfd):
    run = tmp_path / "run"
    chain = ("quickstart.yaml", "tiny/prefix_encoder.yaml", "merge/quickstart.yaml")
    argv = [word for name in chain for word in ("--config", configs / name)]
    assert command("fit", *argv, "--data.worlds=[grid, doom]", "--data.epochs_per_domain=1", "--run", run) == 0
    entries = json.loads((run / "artefacts" / "scores.json").read_text()).values()
    scores = {entry["name"]: entry["scores"] for entry in entries}
    assert scores.keys() == METHODS
    metrics = json.loads((run / "metrics.json").read_text())
    # The mean of the sets, merged once, answers as the mode that merges them for every sample.
    assert scores["average"]["test/accuracy/grid"] == pytest.approx(metrics["test/average/accuracy/grid"], abs=1e-6)
    page, printed = (run / "report.html").read_text(), capfd.readouterr().out
    table = page[page.index("<h2>Artefacts</h2>") :]
    for name in ("dynamic merging", *(f"merged {method}" for method in METHODS)):
        assert f"<td>{name}</td>" in table
        assert name in printed[printed.index("Artefacts, accuracy in %") :]
    assert all(state.sound for state in audit(run))
