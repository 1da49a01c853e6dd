"""Two processes under DDP: coefficients as on one process, one classifier on both, every picture counted once."""

from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import read_manifest

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def folder(experts, tmp_path_factory, pair):
    out = tmp_path_factory.mktemp("ranks")
    pair.run(SCRIPT, out, *(each[2] for each in experts.values()))
    return out


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_coefficients_are_those_of_one_process(results, experts, kit, tmp_path):
    one = kit.fitted_coefficients([each[2] for each in experts.values()], kit.trainer(tmp_path, max_epochs=2))
    first, second = (each["coefficients"] for each in results)
    assert torch.equal(first, second)
    assert (first - 0.3).abs().max() > 0.05
    # Sums in another order; Adam divides small gradients by their size.
    torch.testing.assert_close(first, one.coefficients.detach(), rtol=1e-3, atol=1e-4)


def test_the_artefact_is_written_once(folder):
    manifest = read_manifest(folder / "artefacts" / "merged-ada_merging")
    assert manifest.facts["steps"] > 0
    assert len(manifest.parents) == 2


def test_both_processes_hold_one_classifier_and_count_every_picture_once(results, kit):
    first, second = results
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["pictures"] == second["pictures"] == [11.0]
    assert first["accuracy"] == second["accuracy"]


def test_where_the_artefact_cannot_be_written_both_processes_fail(results):
    assert [each["failure"] for each in results] == ["no space left", "rank 0 failed: OSError: no space left"]
