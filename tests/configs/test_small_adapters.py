"""Records of adapters that run on really pretrained weights and pictures, each a step under the tiny overlay."""

import json

import numpy as np
import pytest
from PIL import Image

RECORDS = {
    "easy_vqa": ["--trainer.max_steps=2", "--data.feature_cache=null"],
    "emoji_captions": ["--trainer.max_epochs=1", "--data.root=ROOT", "--data.feature_cache=ROOT/cache"],
}


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """Eight captioned pictures to train on, four for validation and test."""
    root = tmp_path_factory.mktemp("album")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
    for split, size in {"train": 8, "val": 4, "test": 4}.items():
        rows = [{"image": f"{i}.png", "text": f"picture {i}"} for i in range(size)]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize(("record", "figure"), [("easy_vqa", "accuracy/vqa"), ("emoji_captions", "CIDEr/caption")])
def test_it_trains_and_is_judged(record, figure, command, configs, album, tmp_path):
    given = [option.replace("ROOT", str(album)) for option in RECORDS[record]]
    layers = ("--config", configs / "adapters" / f"{record}.yaml", "--config", configs / "tiny" / "llava.yaml")
    run = tmp_path / "run"
    assert command("fit", *layers, *given, "--run", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {f"val/{figure}", f"test/{figure}"} <= metrics.keys()
    assert 0 < metrics["train/loss"] < 20
    cached = list((album / "cache").glob("*/shard-*"))
    assert bool(cached) == (record == "emoji_captions")
    assert "Scores of what was written" in (run / "report.html").read_text()
