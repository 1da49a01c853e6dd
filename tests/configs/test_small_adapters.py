"""Records of adapters that run on really pretrained weights and pictures, each a step under the tiny overlay."""

import json

import pytest

RECORDS = {
    "easy_vqa": ["--trainer.max_steps=2", "--data.feature_cache=null"],
    "emoji_captions": ["--trainer.max_epochs=1", "--data.root=ROOT", "--data.feature_cache=ROOT/cache"],
}


@pytest.mark.parametrize(
    ("record", "overlay", "figure"),
    [
        ("easy_vqa", "llava", "accuracy/vqa"),
        ("easy_vqa", "llava_port", "accuracy/vqa"),
        ("emoji_captions", "llava", "CIDEr/caption"),
    ],
)
def test_it_trains_and_is_judged(record, overlay, figure, command, configs, album, tmp_path):
    given = [option.replace("ROOT", str(album)) for option in RECORDS[record]]
    layers = ("--config", configs / "adapters" / f"{record}.yaml", "--config", configs / "tiny" / f"{overlay}.yaml")
    run = tmp_path / "run"
    assert command("fit", *layers, *given, "--run", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {f"val/{figure}", f"test/{figure}"} <= metrics.keys()
    assert 0 < metrics["train/loss"] < 20
    cached = list((album / "cache").glob("*/shard-*"))
    assert bool(cached) == (record == "emoji_captions")
    assert "Scores of what was written" in (run / "report.html").read_text()
