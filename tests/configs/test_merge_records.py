"""Every shipped record of a merge says where its figure is from, and merges as it says."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fulgurite
from fulgurite.checkpoints import load_tensors
from fulgurite.cli import main
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.ties import Ties

FOLDER = Path(fulgurite.__file__).parent / "configs" / "merge"
EXPECTED = {
    "average": Average(),
    "task_arithmetic": TaskArithmetic(0.3),
    "ties": Ties(0.2, 0.3, "sum", dialect="official"),
}


def test_no_record_is_left_out():
    found = {path.stem for path in FOLDER.glob("*.yaml") if "cli.py merge" in path.read_text(encoding="utf-8")}
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_of_the_header_merges_as_the_record_says(name, tmp_path, monkeypatch):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    header = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    text = " ".join(header)
    assert 3 <= len(header) <= 6
    assert "arXiv" in text
    assert re.search(r"\d\d\.\d %", text)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"x": torch.randn(30, 5, generator=generator)}
    experts = [{"x": base["x"] + torch.randn(30, 5, generator=generator)} for _ in range(2)]
    save_file(base, "clip-vit-base-patch32.safetensors")
    for number, expert in enumerate(experts):
        save_file(expert, f"clip-vit-base-patch32_{number}.safetensors")
    command = text.partition("python cli.py ")[2].replace("'", "").replace("configs/merge", str(FOLDER))
    command = re.sub(r"(clip-vit-base-patch32\S*?)(\]|\s)", r"\1.safetensors\2", command)
    assert main(command.split()) == 0
    merger = EXPECTED[name]
    expected = merger(experts, base if merger.needs_base else None)
    assert torch.equal(load_tensors(f"merged/{name}")["x"], expected["x"])
