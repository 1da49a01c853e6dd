"""The commands on files: verify, inspect, features, data."""

import json

import pytest
import torch

from fulgurite.checkpoints import save_checkpoint_folder
from fulgurite.cli import main


@pytest.fixture
def run(tmp_path):
    for name in ("first", "last"):
        weights = {"weights": {"layer.weight": torch.arange(6.0).reshape(2, 3)}}
        save_checkpoint_folder(tmp_path / "checkpoints" / name, weights, metrics={"val/accuracy": 0.5})
    return tmp_path


def test_verify_finds_a_flipped_bit(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("good") == 2
    file = run / "checkpoints" / "last" / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert main(["verify", str(run)]) == 2
    out = capsys.readouterr().out
    assert out.count("good") == 1
    assert "DAMAGED" in out
    assert "layer.weight" in out
    assert main(["verify", str(run / "checkpoints" / "first")]) == 0


def test_inspect_prints_the_manifest(run, capsys):
    path = str(run / "checkpoints" / "last")
    assert main(["inspect", path, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "layer.weight: float32 [2, 3]" in out
    assert "6 numbers" in out
    assert "val/accuracy: 0.5" in out
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"val/accuracy": 0.5}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["verify", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify"], "path"),
        (["inspect", ".", "--tensor"], "--tensor"),
        (["data", "worlds"], "--out"),
        (["data", "moons"], "moons"),
        (["data", "worlds", "--out", "x", "--domains", "moon"], "moon"),
        (["features"], "videos and encoder: required"),
        (["features", "--encoder", "TimFrameEncoder", "--videos", "[x]"], "did you mean TimmFrameEncoder"),
        (["features", "--encoder", "os.system", "--videos", "[x]"], "not allowed"),
    ],
)
def test_wrong_use_is_one_message(argv, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.startswith(f"fulgurite {argv[0]}: ")
    assert "Traceback" not in err
    assert "usage:" not in err


@pytest.mark.parametrize("command", ["features", "data", "verify", "inspect"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: fulgurite {command}" in capsys.readouterr().out


def test_features_are_stored_once(tmp_path, monkeypatch, capsys):
    from fractions import Fraction

    import av
    import numpy as np

    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for value in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    monkeypatch.chdir(tmp_path)
    encoder = "{class_path: TimmFrameEncoder, init_args: {model: resnet18, weights: null, size: 32, grid: 0}}"
    argv = ["features", f"--encoder={encoder}", "--videos=[videos]", "--num_workers=0", "--sampling.count=4"]
    assert main(argv) == 0
    assert "1 of 1 videos" in capsys.readouterr().out
    stored = sorted(tmp_path.glob(".cache/features/*/*/*.safetensors"))
    assert len(stored) == 1
    time = stored[0].stat().st_mtime_ns
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "1 of 2 videos" in out
    assert "broken.mp4" in err
    assert stored[0].stat().st_mtime_ns == time
