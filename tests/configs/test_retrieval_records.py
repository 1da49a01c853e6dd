"""Every record of video-text retrieval runs a step of training, validation and test on small files of its data set."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml

import fulgurite
from fulgurite.checkpoints import load_tensors, newest_checkpoint
from fulgurite.commands.yaml_loader import load_file

ROOT = Path(fulgurite.__file__).parent
TINY = "configs/tiny/open_clip.yaml"
RECORDS = sorted(path.name for path in (ROOT / "configs" / "retrieval").glob("*.yaml"))
SETS = ("MsrVtt", "Msvd", "Lsmdc", "ActivityNet", "Didemo", "Vatex")
TRAIN, VAL, TEST = [f"t{i}" for i in range(12)], ["v0", "v1"], ["x", "y", "z"]


def captions(name):
    return [f"a box of {name}", f"{name} goes down"]


def write_lists(root, splits):
    for split, names in splits.items():
        (root / f"{split}_list.txt").write_text("".join(f"{name}\n" for name in names))


def write_set(kind, root):
    """The files of a data set in its official layout, but for the videos."""
    splits = {"train": TRAIN, "val": VAL, "test": TEST}
    every = [*TRAIN, *VAL, *TEST]
    if kind == "MsrVtt":
        (root / "MSRVTT_train.9k.csv").write_text("video_id\n" + "\n".join(TRAIN) + "\n")
        rows = [f"k{i},m{i},{name},{captions(name)[0]}" for i, name in enumerate(TEST)]
        (root / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + "\n".join(rows) + "\n")
        said = [{"video_id": name, "caption": caption} for name in TRAIN for caption in captions(name)]
        (root / "MSRVTT_data.json").write_text(json.dumps({"videos": [], "sentences": said}))
    elif kind == "Msvd":
        write_lists(root, splits)
        words = {name: [caption.split() for caption in captions(name)] for name in every}
        (root / "raw-captions.pkl").write_bytes(pickle.dumps(words))
    elif kind == "Lsmdc":
        files = ("LSMDC16_annos_training.csv", "LSMDC16_annos_val.csv", "LSMDC16_challenge_1000_publictect.csv")
        for file, names in zip(files, splits.values()):
            (root / file).write_text("".join(f"{name}\t0\t1\t0\t1\t{captions(name)[0]}\n" for name in names))
    elif kind == "ActivityNet":
        entries = {name: {"duration": 1.0, "timestamps": [[0, 1]], "sentences": captions(name)} for name in every}
        for file, names in (("train", TRAIN), ("val", TEST)):
            (root / f"{file}_ids.json").write_text(json.dumps([f"v_{name}" for name in names]))
        for file in ("train", "val_1"):
            (root / f"{file}.json").write_text(json.dumps({f"v_{name}": entry for name, entry in entries.items()}))
    elif kind == "Didemo":
        write_lists(root, splits)
        for split, names in splits.items():
            rows = [{"video": name, "description": c, "times": [[0, 0]]} for name in names for c in captions(name)]
            (root / f"{split}_data.json").write_text(json.dumps(rows))
    elif kind == "CaptionedVideos":
        for split, names in splits.items():
            rows = [{"video": f"videos/{name}.mp4", "captions": captions(name)} for name in names]
            (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "Vatex":
        write_lists(root, {"train": TRAIN, "test": TEST})
        (root / "ref_captions.json").write_text(json.dumps({name: captions(name) for name in every}))


@pytest.fixture(scope="module")
def videos(tmp_path_factory, clip_writer):
    folder = tmp_path_factory.mktemp("films") / "videos"
    folder.mkdir()
    for i, name in enumerate([*TRAIN, *VAL, *TEST]):
        clip_writer(folder / f"{name}.mp4", i)
    return folder


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.usefixtures("compared_in_process")
def test_it_runs_a_step_under_its_tiny_overlay(record, command, videos, tmp_path):
    header = (ROOT / "configs" / "retrieval" / record).read_text().partition("\nseed")[0]
    base, *over = re.findall(r"--config (\S+\.yaml)", header)
    chain = [load_file(ROOT / each) for each in (base, *over)]
    kind = next(each["data"]["class_path"] for each in reversed(chain) if "class_path" in each.get("data", {}))
    write_set(kind, tmp_path)
    (tmp_path / "videos").symlink_to(videos)
    own = [part for each in (base, *over, TINY) for part in ("--config", ROOT / each)]
    lengths = ["--model.head.max_frames=2"]
    argv = [*own, *lengths, "--trainer.precision=32-true", f"--data.root={tmp_path}", "--trainer.max_epochs=1"]
    if kind == "CaptionWorlds":
        argv = [*own, *lengths, "--data.epochs_per_domain=1"]
    run = tmp_path / "run"
    assert command("fit", *argv, "--run", run, "--test_after_fit=true") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(0 <= metrics[f"{split}/text_to_video/R@10"] <= 100 for split in ("val", "test"))
    assert newest_checkpoint(run) is not None
    assert "Recall in %" in (run / "report.html").read_text()


# The records above are of VideoTextRetrieval, and continual.yaml is of CaptionWorlds.
PAIRS = [("VideoTextRetrieval", "CaptionedVideos")]
PAIRS += [("ContinualRetrieval", kind) for kind in ("CaptionedVideos", *SETS)]


@pytest.mark.parametrize(("module", "kind"), PAIRS)
@pytest.mark.usefixtures("compared_in_process")
def test_a_pair_of_module_and_datamodule_runs_a_step(module, kind, command, videos, tmp_path):
    write_set(kind, tmp_path)
    (tmp_path / "videos").symlink_to(videos)
    chain = ["quickstart.yaml", *(["continual.yaml"] if module == "ContinualRetrieval" else [])]
    argv = [part for each in chain for part in ("--config", ROOT / "configs" / "retrieval" / each)]
    argv += ["--config", ROOT / TINY, "--model.head.max_frames=2", f"--data.class_path={kind}"]
    argv += [f"--data.root={tmp_path}", "--trainer.max_epochs=1", "--run", tmp_path / "run"]
    assert command("fit", *argv, "--test_after_fit=true") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["train/loss"] < 20
    assert 0 <= metrics["test/video_to_text/R@10"] <= 100


@pytest.mark.usefixtures("compared_in_process")
def test_an_optimizer_of_another_class_has_its_own_defaults(command, videos, tmp_path):
    write_set("MsrVtt", tmp_path)
    (tmp_path / "videos").symlink_to(videos)
    argv = [part for each in ("configs/retrieval/ucofia_msr_vtt.yaml", TINY) for part in ("--config", ROOT / each)]
    argv += ["--trainer.precision=32-true", f"--data.root={tmp_path}", "--trainer.max_epochs=1"]
    assert command("fit", *argv, "--model.head.max_frames=2", "--run", tmp_path / "run", "--test_after_fit=false") == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert (written["init_args"]["betas"], written["init_args"]["eps"]) == ([0.9, 0.98], 1e-6)


@pytest.mark.parametrize(
    "record", ["ucofia_msr_vtt.yaml", pytest.param("quickstart.yaml", marks=pytest.mark.slow), "continual.yaml"]
)
@pytest.mark.usefixtures("compared_in_process")
def test_a_resumed_run_ends_with_the_same_bits(record, command, videos, tmp_path):
    """All weights, adapters with a head, and a stream; the selection of patches is random while training."""
    kind = "MsrVtt" if record.startswith("ucofia") else "CaptionedVideos"
    write_set(kind, tmp_path)
    (tmp_path / "videos").symlink_to(videos)
    chain = ["quickstart.yaml", record] if record == "continual.yaml" else [record]
    argv = [part for each in chain for part in ("--config", ROOT / "configs" / "retrieval" / each)]
    argv += ["--config", ROOT / TINY, "--model.head.max_frames=2", f"--data.class_path={kind}"]
    argv += [f"--data.root={tmp_path}", "--trainer.max_epochs=2", "--trainer.precision=32-true"]
    argv += ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1", "--test_after_fit=false"]
    assert command("fit", *argv, "--run", tmp_path / "whole") == 0
    for step in (1, 2):
        (at,) = (tmp_path / "whole" / "checkpoints").glob(f"*-step={step}")
        run = tmp_path / f"from {step}"
        assert command("fit", *argv, "--ckpt_path", at, "--run", run) == 0
        ours, theirs = (load_tensors(each / "checkpoints" / "last") for each in (run, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
