"""``features`` from an experiment record: it fills exactly the store that a fit of the same record reads."""

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import fulgurite
from fulgurite.cli import main
from fulgurite.samples import features

CONFIGS = Path(fulgurite.__file__).parent / "configs"
RECORD = ["--config", str(CONFIGS / "own_videos.yaml"), "--config", str(CONFIGS / "tiny" / "prefix_encoder.yaml")]


def write_clip(path, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(4):
            picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder ``own`` below the working directory: five clips, the last one asked about without answer."""
    (tmp_path / "own").mkdir()
    for i in range(5):
        write_clip(tmp_path / "own" / f"{i}.mp4", i)
    clips = {"train": (0, 1, 2), "val": (0,), "test": (3,), "questions": (4,)}
    for split, numbers in clips.items():
        rows = [{"video": f"{i}.mp4", "question": "What?", "answer": f"a{i % 2}"} for i in numbers]
        (tmp_path / "own" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    return tmp_path / "own"


def refuse(encoder, waiting, batch_frames):
    assert not waiting, "a fit after the features command must compute nothing"
    return {}


@pytest.mark.parametrize("options", [[], ["--data.feature_dtype=float32"], ["--model.backbone.num_frames=3"]], ids=str)
def test_a_fit_finds_all_features(own, capsys, monkeypatch, options):
    argv = [*RECORD, "--data.root=own", "--data.feature_cache=cache", *options]
    assert main(["features", *argv, "--num_workers=0", "--device=cpu"]) == 0
    assert f"5 of 5 files have features in {own.parent / 'cache'}" in capsys.readouterr().out
    monkeypatch.setattr(features, "_encode", refuse)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.max_epochs=1"]
    assert main(["fit", *argv, *quiet, "--run=run"]) == 0
    assert main(["predict", "--ckpt_path=run", *quiet[:2]]) == 0
    assert len(list(Path("cache").iterdir())) == 1


def test_a_bad_video_is_named_or_left_out(own, capsys):
    (own / "3.mp4").write_bytes(b"no video")
    argv = ["features", *RECORD, "--data.root=own", "--data.feature_cache=cache", "--num_workers=0"]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "4 of 5 files" in said.out
    assert "3.mp4" in said.err
    assert main([*argv, "--data.on_bad=skip"]) == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "set --data.feature_cache"),
        (["--data.feature_cache=cache", "--config=blind.yaml"], "looks at no frames"),
        (["--data.feature_cache=cache", "--data.rot=own"], "did you mean root"),
        (["--data.feature_cache=cache", "--num_workers=many"], "--num_workers"),
    ],
)
def test_records_without_features_are_one_message(own, capsys, options, part):
    blind = {"backbone": {"init_args": {"frame_encoder": None}}}
    blind["adapters"] = [{"points": ["attention_output"], "kind": "LoRA"}]
    Path("blind.yaml").write_text(json.dumps({"model": {"init_args": blind}}))
    assert main(["features", *RECORD, "--data.root=own", *options]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert "Traceback" not in err
    assert not Path("cache").exists()


@pytest.mark.parametrize("cuda", [False, True])
def test_the_encoder_runs_on_a_gpu_if_there_is_one(own, monkeypatch, cuda):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **more: (moved.append(to), self)[1])
    argv = ["features", *RECORD, "--data.root=own", "--data.feature_cache=cache", "--num_workers=0"]
    assert main(argv) == 0
    assert moved[-1] == ("cuda" if cuda else "cpu",)
    assert main([*argv, "--device=nowhere"]) == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--sampling.count=0"], "sampling.count = 0 (command line), refused by FrameSampling: "),
        (
            ["--encoder.grid=2"],
            "encoder.grid = 2 (command line), refused by TimmFrameEncoder: grid=2 cells per side, but ",
        ),
    ],
)
def test_what_a_constructor_refuses_is_told_with_its_option(own, capsys, options, part):
    settings = "{model: resnet18, weights: null, size: 32, grid: 1}"
    encoder = f"--encoder={{class_path: TimmFrameEncoder, init_args: {settings}}}"
    assert main(["features", "--videos=[own]", encoder, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fulgurite features: {part}")
    assert err.count("\n") == 1


def test_options_of_a_record_may_be_written_with_hyphens(own, capsys):
    assert main(["features", *RECORD, "--data.root=own", "--data.feature_cache=cache", "--num-workers=0"]) == 0
    assert "5 of 5 files" in capsys.readouterr().out
