"""The commands on files: verify, inspect, features, data."""

import json
import re
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import load_tensors, read_manifest, save_checkpoint_folder, write_json, write_text
from fulgurite.checkpoints.shards import SHARDS, Place, layout_of, shard_stem
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.cli import main

BASE = {"source": "tiny-text", "digest": "xxh3_128:0a"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with two checkpoints, one adapter folder and a config, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/quick/1")
    weights = {f"bank.sets.{name}.site.weight": torch.arange(6.0).reshape(2, 3) for name in ("red", "live")}
    stages = [{"name": "red"}, {"name": "green"}]
    for step, name in enumerate(("first", "last")):
        save_checkpoint_folder(
            folder / "checkpoints" / name,
            {"weights": weights | {"router.sums": torch.ones(4, dtype=torch.float64)}},
            {"state": {"moment": torch.ones(100)}},
            kind="delta",
            base=BASE,
            parents=[{"path": "runs/other", "digest": "xxh3_128:0b"}],
            settings={"model": {"class_path": "fulgurite.modules.video_qa.VideoQA"}},
            metrics={"val/accuracy": 0.5, "val/accuracy/red": 0.25, "loss": 1.0},
            facts={
                "epoch": 3,
                "global_step": step,
                "stage": 1,
                "stages": stages,
                "info": {"answers": ["a", "b", "c"], "domains": ["red", "green"]},
                "info_digest": "5f",
                "parameters": {"trained": 6, "model": 600},
            },
        )
    adapters = {"adapters": {"site.weight": torch.ones(6)}}
    save_checkpoint_folder(folder / "adapters" / "red", adapters, kind="delta", base=BASE, facts={"set": "red"})
    write_text(folder / "config.yaml", "seed: 1\n")
    write_json(folder / "metrics.json", {"test/accuracy": 0.75})
    (folder / "events.out").write_bytes(b"log")
    return folder


def rows(out):
    """Cells of every line of what was printed."""
    return [line.split() for line in out.splitlines()]


def test_verify_says_the_state_of_every_file(run, capsys):
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    for name in ("config.yaml", "checkpoints/last/weights.safetensors", "adapters/red/manifest.json"):
        assert ["good", name] in found
    assert ["not", "covered", "events.out"] in found
    assert f"{run}: 13 good, 1 not covered: every recorded digest is right" in out
    assert main(["verify", "runs", str(run / "checkpoints"), str(run / "checkpoints" / "last")]) == 0
    out = capsys.readouterr().out
    assert "runs: 13 good, 1 not covered: every" in out
    assert "runs/quick/1/checkpoints: 8 good: every" in out
    assert "runs/quick/1/checkpoints/last: 4 good: every" in out


def test_verify_finds_a_flipped_bit(run, capsys):
    file = run / "checkpoints" / "last" / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for path in ("runs", str(run), str(run / "checkpoints"), str(run / "checkpoints" / "last")):
        assert main(["verify", path]) == 2
        out = capsys.readouterr().out
        assert re.search(r"weights\.safetensors is damaged: tensor 'bank\.sets\.red\.site\.weight' has digest", out)
        assert re.search(r"1 damaged.*: DAMAGED", out)
    assert main(["verify", str(run / "checkpoints" / "first")]) == 0


def test_verify_misses_what_is_gone_and_never_calls_the_rest_good(run, capsys):
    (run / "checkpoints" / "last" / "manifest.json").unlink()
    for path in (run, run / "checkpoints" / "last"):
        assert main(["verify", str(path)]) == 2
        out = capsys.readouterr().out
        assert "1 missing" in out
        assert "DAMAGED" in out
    (run / "logs").mkdir()
    for number in range(20):
        (run / "logs" / f"{number:02}.txt").write_text("x")
    assert main(["verify", str(run / "logs")]) == 2
    out = capsys.readouterr().out
    assert "and 13 more files" in out
    assert "20 not covered: nothing here has a digest" in out


def test_inspect_shows_a_checkpoint_to_a_person(run, capsys):
    assert main(["inspect", str(run / "checkpoints" / "last"), "--tensors", "--settings"]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    for row in (
        ["kind", "delta"],
        ["base", "tiny-text", "xxh3_128:0a"],
        ["module", "fulgurite.modules.video_qa.VideoQA"],
        ["stage", "2", "of", "2:", "green"],
        ["epoch", "3"],
        ["step", "1"],
        ["data", "3", "answers;", "domains", "red,", "green"],
        ["data", "digest", "5f"],
        ["trained", "6", "of", "600", "parameters", "(1.00%)"],
        ["runs/other", "(missing)", "source", "xxh3_128:0b"],
        ["red", "1", "6", "1.00%", "24", "B"],
        ["live", "1", "6", "1.00%", "24", "B"],
        ["router", "1", "4", "0.67%", "32", "B"],
        ["val/accuracy", "0.5"],
        ["bank.sets.red.site.weight", "float32", "[2,", "3]", "weights.safetensors"],
        ["class_path:", "fulgurite.modules.video_qa.VideoQA"],
    ):
        assert row in found, row
    assert f"torch {torch.__version__}" in out
    size = (run / "checkpoints" / "last" / "state.safetensors").stat().st_size
    assert ["state.safetensors", f"{size}", "B", "1"] in [row[:4] for row in found]


def test_inspect_shows_all_that_a_checkpoint_was_made_from(run, tmp_path, capsys):
    digests, before = [], str(run / "checkpoints" / "last")
    for name, settings in (
        ("merged", {"merger": "fulgurite.methods.merging.ties.Ties"}),
        ("pruned", {"prune": {"class_path": "fulgurite.methods.pruning.wanda.Wanda", "init_args": {}}}),
        ("quantized", {}),
    ):
        digests.append(read_manifest(before).digest)
        parents = [{"path": before, "digest": digests[-1]}]
        save_checkpoint_folder(tmp_path / name, {"weights": {"w": torch.ones(1)}}, parents=parents, settings=settings)
        before = str(tmp_path / name)
    assert main(["inspect", before]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "source" in line]
    last = f"{run}/checkpoints/last"
    expected = [
        [f"{tmp_path}/pruned", "source", "prune", "Wanda", digests[2]],
        [f"{tmp_path}/merged", "source", "merge", "Ties", digests[1]],
        [last, "source", "training", digests[0]],
        ["runs/other", "(missing)", "source", "xxh3_128:0b"],
    ]
    assert [line.split() for line in found] == expected
    depths = [len(line) - len(line.lstrip()) for line in found]
    assert depths == [depths[0] + 2 * depth for depth in range(4)]


def test_inspect_shows_a_run_and_its_newest_checkpoint(run, capsys):
    for path in (run, Path("runs")):
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        names = [cells[0] for cells in rows(out) if cells and cells[0].endswith(("first", "last", "red"))]
        inner = "" if path == run else "quick/1/"
        assert names[:3] == [f"{inner}{n}" for n in ("adapters/red", "checkpoints/first", "checkpoints/last")]
        assert ["step", "1"] in rows(out)
        assert (["test/accuracy", "0.75"] in rows(out)) == (path == run)


def test_inspect_for_a_machine(run, capsys):
    assert main(["inspect", str(run / "checkpoints" / "last"), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["metrics"]["val/accuracy"] == 0.5
    assert one["sets"]["router"] == {"tensors": 1, "parameters": 4, "bytes": 32}
    assert one["facts"]["software"]["torch"] == torch.__version__
    assert one["digest"] == read_manifest(run / "checkpoints" / "last").digest
    assert main(["inspect", "runs", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert [Path(each["path"]).name for each in every] == ["red", "first", "last"]
    assert every[2] == one


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A checkpoint of two ranks: slices of two tensors and of the optimizer's state, and a buffer that is whole."""
    monkeypatch.chdir(tmp_path)
    state = "optimizer_states.0.state.0.exp_avg"
    whole = {"weights/layer.weight": torch.arange(12.0).reshape(3, 4), "weights/layer.bias": torch.ones(1)}
    whole[f"state/{state}"] = torch.ones(3, 4)
    halves = [{name: tensor[:2] for name, tensor in whole.items()}, {n: t[2:] for n, t in whole.items()}]
    places = [
        {tuple(n.split("/")): Place(whole[n].shape, (start, *[0] * (t.ndim - 1)), t.shape) for n, t in half.items()}
        for start, half in zip((0, 2), halves)
    ]
    manifest = new_manifest(structure={SHARDS: layout_of(places), "family": "bert"})

    def others(folder):
        files = {f"{shard_stem(rank, 2)}.safetensors": half for rank, half in enumerate(halves)}
        return {name: write_tensors(folder / name, half, "xxh3_128") for name, half in files.items()}

    written = encode({"weights": {"seen.count": torch.zeros(5)}})
    write_checkpoint("sharded", manifest, *written, others=others)
    assert load_tensors("sharded")["layer.weight"].equal(whole["weights/layer.weight"])
    return "sharded"


def test_inspect_counts_each_tensor_of_slices_once(sharded, capsys):
    assert main(["inspect", sharded]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert ["layer", "2", "13", "52", "B"] in found
    assert ["seen", "1", "5", "20", "B"] in found
    assert ["shards", "2", "files"] in found
    assert [row for row in found if row[:1] == ["structure"]] == [["structure", "family:", '"bert"']]
    for part in ("weights/", "state/", "pieces", "offset", "exp_avg"):
        assert part not in out, part
    assert main(["inspect", sharded, "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert sets == {
        "layer": {"tensors": 2, "parameters": 13, "bytes": 52},
        "seen": {"tensors": 1, "parameters": 5, "bytes": 20},
    }
    assert main(["inspect", sharded, "--tensors"]) == 0
    assert ["weights/layer.weight", "float32", "[2,", "4]", "shard-00000-of-00002.safetensors"] in rows(
        capsys.readouterr().out
    )


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
    assert "1 of 1 files" in capsys.readouterr().out
    stored = sorted(tmp_path.glob(".cache/features/*/*/*.safetensors"))
    assert len(stored) == 1
    assert main(["verify", ".cache/features"]) == 0
    assert "2 good: every recorded digest is right" in capsys.readouterr().out
    assert main(["inspect", ".cache/features"]) == 0
    assert "features of 1 videos in 1 shards" in capsys.readouterr().out
    time = stored[0].stat().st_mtime_ns
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "1 of 2 files" in out
    assert "broken.mp4" in err
    assert stored[0].stat().st_mtime_ns == time
