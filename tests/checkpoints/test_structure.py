"""A changed module is rebuilt from data before its weights load, and nothing else is built."""

import sys

import pytest
import torch
from torch import nn

from fulgurite.checkpoints import MismatchError, RefusedError, load_tensors, read_manifest, save_checkpoint_folder
from fulgurite.checkpoints.structure import rebuild


def network(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Sequential(nn.Linear(width, 3)))


def entry(name, **arguments):
    return {"class": f"torch.nn.modules.{name}", "arguments": arguments}


NARROW = {
    "0": entry("linear.Linear", in_features=4, out_features=5),
    "2.0": entry("linear.Linear", in_features=5, out_features=3, bias=False),
}


def test_a_narrower_model_loads_into_the_class_of_the_wide_one(tmp_path):
    pruned = network(5)
    pruned[2][0].bias = None
    save_checkpoint_folder(tmp_path / "c", {"weights": pruned.state_dict()}, structure={"modules": NARROW})
    wide = network().eval()
    rebuild(wide, read_manifest(tmp_path / "c").structure)
    wide.load_state_dict(load_tensors(tmp_path / "c"), strict=True)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wide(x), pruned(x))
    assert not any(module.training for module in wide.modules())


def test_without_changes_the_model_stays(tmp_path):
    model = network()
    before = list(model.modules())
    rebuild(model, {})
    rebuild(model, {"shards": {"weights": {}}})
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("structure", "error", "said"),
    [
        ({"modules": {"5": entry("linear.Identity")}}, MismatchError, "names 5 "),
        ({"modules": {"": entry("linear.Identity")}}, MismatchError, "names "),
        ({"masks": {}}, MismatchError, "holds masks"),
        ({"modules": {"0": {"class": "os.system", "arguments": {"command": "x"}}}}, RefusedError, "'os.system'"),
        ({"modules": {"0": {"class": "torch.hub.load", "arguments": {}}}}, RefusedError, "torch.hub.load"),
        (
            {"modules": {"0": {"class": "torch.nn.modules.linear.math.sqrt", "arguments": {}}}},
            RefusedError,
            "cannot be",
        ),
        ({"modules": {"0": entry("linear.F", x=1)}}, RefusedError, "is no module"),
        ({"modules": {"0": entry("linear.Linear", width=1)}}, RefusedError, "width"),
        ({"modules": {"0": entry("nothing.Here")}}, RefusedError, "nothing"),
        ({"modules": {"0": "Linear"}}, RefusedError, "'Linear'"),
    ],
)
def test_what_is_not_admitted_changes_nothing(structure, error, said):
    model = network()
    before, loaded = list(model.modules()), set(sys.modules)
    with pytest.raises(error, match=said):
        rebuild(model, structure)
    assert list(model.modules()) == before
    assert "antigravity" not in set(sys.modules) - loaded
