import importlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

# Lightning cuts its loggers off where it is imported before pytest listens; then caplog hears nothing.
for name in ("lightning.pytorch", "lightning.fabric"):
    importlib.import_module(name)
    logging.getLogger(name).propagate = True

DOMAINS = ("red", "green", "blue")
SIZES = {"train": 20, "val": 6, "test": 7}
LONG = ("test_resume.py", "test_two_processes.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that parallel workers end together."""
    items.sort(key=lambda item: item.path.name not in LONG)


def write_clip(path, channel, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(4):
            picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            picture[8 * t : 8 * t + 24, 8 : 32 + 8 * (seed % 3), channel] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Three domains of little videos with questions, in the layout of JsonlDataModule."""
    root = tmp_path_factory.mktemp("stream")
    for channel, domain in enumerate(DOMAINS):
        folder = root / domain
        folder.mkdir()
        for clip in range(6):
            write_clip(folder / f"{clip}.mp4", channel, clip)
        for split, size in SIZES.items():
            rows = [
                {
                    "id": f"{split}{i}",
                    "video": f"{i % 6}.mp4",
                    "question": f"How wide is the {domain} box?" if i % 2 else f"Is the {domain} box wide?",
                    "answer": f"size {i % 3}" if i % 2 else ("yes" if i % 3 else f"no {domain}"),
                    "kind": "size" if i % 2 else "yesno",
                }
                for i in range(size)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


CONFIG = """\
seed_everything: 0
test_after_fit: true
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: -1
  gradient_clip_val: 1.0
  reload_dataloaders_every_n_epochs: 1
  use_distributed_sampler: false
  log_every_n_steps: 1
  enable_progress_bar: false
model:
  class_path: ContinualVideoQA
  init_args:
    backbone:
      class_path: PrefixEncoder
      init_args:
        pretrained: false
        text_config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
        routing_layer: -2
        frame_encoder:
          class_path: TimmFrameEncoder
          init_args: {model: test_efficientnet, weights: null, pretrained: false, size: 64, grid: 2}
        num_frames: 2
    adapters:
      - points: [attention_output, feed_forward_output]
        kind: {class_path: Bottleneck, init_args: {reduction: 8, dropout: 0.2}}
      - points: [video_projection]
        kind: Replace
    second_router: {class_path: CentroidRouter, init_args: {normalize_parts: true}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-2}}
data:
  class_path: ContinualDataModule
  init_args:
    domains: [%s]
    epochs_per_domain: 2
    batch_size: 10
"""


@pytest.fixture(scope="session")
def stream_config(stream_folder, tmp_path_factory):
    """The config of a run over the stream: 3 stages of 2 epochs of 2 steps, with dropout."""
    splits = ", ".join(f"{split}: {split}.jsonl" for split in SIZES)
    data = "{class_path: JsonlDataModule, init_args: {root: %s, domain: %s, %s}}"
    domains = ", ".join(data % (json.dumps(str(stream_folder / name)), name, splits) for name in DOMAINS)
    path = tmp_path_factory.mktemp("configs") / "stream.yaml"
    path.write_text(CONFIG % domains)
    return path


@pytest.fixture
def compared_in_process(monkeypatch):
    """Exports without a process of their own for the comparison, which takes seconds to start."""
    from fulgurite.backbones import reload
    from fulgurite.modules import export_files

    def compare(library, folder, inputs, expected, model_class="", base="", stored="dense"):
        names = ("library", "folder", "model_class", "base", "stored")
        request = dict(zip(names, (library, str(folder), model_class, base, stored)))
        named = {f"input.{n}": t for n, t in inputs.items()} | {f"output.{n}": t for n, t in expected.items()}
        return reload.compare(request, named)

    monkeypatch.setattr(export_files, "compare_fresh", compare)


class Pair:
    """Two processes with a rank each, which cost most of the time to start, so that one script follows the other."""

    def __init__(self, folder):
        self.folder, self.number, self.ranks = folder, 0, []

    def start(self):
        shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("rank.py")],
                env={**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def stop(self):
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        self.ranks = []

    def run(self, script, *arguments, timeout_s=300):
        """Run a script on both ranks, which must end well; what each has written."""
        if not self.ranks:
            self.start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        outputs = [self.folder / f"{self.number}-{rank}.txt" for rank in range(2)]
        self.number += 1
        for rank, output in zip(self.ranks, outputs):
            job = {"argv": [str(script), *map(str, arguments)], "output": str(output), "port": port}
            print(json.dumps(job), file=rank.stdin, flush=True)
        codes = [
            rank.stdout.readline() if select.select([rank.stdout], [], [], timeout_s)[0] else "late"
            for rank in self.ranks
        ]
        texts = [output.read_text() for output in outputs]
        if codes != ["0\n"] * 2:
            self.stop()
            raise AssertionError(f"exit codes {codes}\n" + "\n".join(text[-6000:] for text in texts))
        return texts


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """`Pair.run` runs a script in two processes, with a rank each."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def one_thread():
    """Of one thread sums are equal to the bit, and a forked process waits for none that only its parent has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_pictures(folder, names, side, rng):
    """A grid of 49 features of width 8 and a small picture for each name."""
    import h5py
    from PIL import Image

    features = folder / "clip_features" / "data_clip_RN101_att"
    (folder / "images").mkdir(parents=True)
    features.mkdir(parents=True)
    for name in names:
        with h5py.File(features / f"{name}.h5", "w") as file:
            file[f"{name}/features"] = rng.normal(size=(49, 8)).astype(np.float32)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / "images" / f"{name}.png")


@pytest.fixture(scope="session")
def picture_root(tmp_path_factory):
    """VQAv2, GQA, NLVR2 and COCO captions in the files of VL-T5; features have width 8."""
    root, rng = tmp_path_factory.mktemp("datasets"), np.random.default_rng(0)
    for folder, names in (
        ("COCO", [f"COCO_val2014_{i:012}" for i in range(6)]),
        ("VG", [str(100 + i) for i in range(4)]),
        ("GQA", ["n1", "n2"]),
        ("nlvr", [f"{split}-{i}-0-img{k}" for split in ("train", "dev", "test1") for i in range(4) for k in (0, 1)]),
    ):
        write_pictures(root / folder, names, 32, rng)
    for split, size in (("karpathy_train", 8), ("karpathy_val", 5), ("karpathy_test", 5), ("test_4", 3)):
        records = [
            {
                "img_id": f"COCO_val2014_{i % 6:012}",
                "question_id": 10 * i,
                "sent": f"What colour is bus {i}?",
                "label": {"red": 1.0, "maroon": 0.3},
                "answers": [{"answer": "red" if k < 9 else "maroon", "answer_id": k + 1} for k in range(10)],
                "answer_type": ("yes/no", "number", "other")[i % 3],
            }
            for i in range(size)
        ]
        if split == "test_4":
            records = [{key: r[key] for key in ("img_id", "question_id", "sent")} for r in records]
        write_json(root / "vqa" / f"{split}.json", records)
    for split, pictures in (("train", "100 101"), ("valid", "102 103"), ("testdev", "n1 n2"), ("submit", "100")):
        records = [
            {"img_id": name, "question_id": f"{split}{name}{i}", "sent": f"Is it {i}?", "label": {"yes": 1.0}}
            for name in pictures.split()
            for i in range(3)
        ]
        write_json(root / "GQA" / f"{split}.json", records)
    for split, name in (("train", "train"), ("valid", "dev"), ("test", "test1")):
        records = [
            {
                "uid": f"nlvr2_{split}_{i}",
                "img0": f"{name}-{i}-0-img0",
                "img1": f"{name}-{i}-0-img1",
                "label": i % 2,
                "sent": f"There is dog {i} in each image.",
            }
            for i in range(4)
        ]
        write_json(root / "nlvr" / f"{split}.json", records)
    images = [
        {
            "filename": f"COCO_val2014_{i:012}.jpg",
            "split": ("train", "restval", "val", "val", "test", "test")[i],
            "sentences": [{"raw": f"Picture {i} in sentence {k}."} for k in range(2)],
        }
        for i in range(6)
    ]
    write_json(root / "COCO" / "dataset_coco.json", {"images": images})
    return root


@pytest.fixture(scope="session")
def video_root(tmp_path_factory):
    """TVQA, How2QA, TVC and YC2C in the files of VALUE; features have width 8."""
    root, rng = tmp_path_factory.mktemp("video"), np.random.default_rng(0)
    for source in ("tv", "how2", "yc2"):
        folder = root / "vis_features" / source / "clip-vit"
        folder.mkdir(parents=True)
        spoken = []
        for i in range(4):
            np.savez(folder / f"{source}{i}.npz", features=rng.normal(size=(50 + 10 * i, 8)).astype(np.float32))
            spoken.append(
                {"vid_name": f"{source}{i}", "sub": [{"text": f" Line {k} of {i}.", "start": k} for k in (0, 1)]}
            )
        (root / "ann").mkdir(exist_ok=True)
        write_lines(root / "ann" / f"{source}_subtitles.jsonl", spoken[:3])
    for task, source, splits in (
        ("tvqa", "tv", "train val test_public test_release"),
        ("how2qa", "how2", "train_release val_release test_public_release"),
        ("tvc", "tv", "train_release val_release test_release"),
        ("yc2c", "yc2", "train_release val_release test_release"),
    ):
        for split in splits.split():
            rows = [video_row(task, f"{source}{i % 4}", i, split) for i in range(8 if "train" in split else 3)]
            write_lines(root / "ann" / task / f"{task}_{split}.jsonl", rows)
    return root


def video_row(task, video, number, split):
    """A record of one of these sets; those that are released for the leaderboard of TVQA have no answer."""
    row = {"vid_name": video, "ts": f"{number}.10-9.75"}
    if task in ("tvqa", "how2qa"):
        choices = {f"a{k}": f"choice {k} . " for k in range(5 if task == "tvqa" else 4)}
        answer = {} if split == "test_release" else {"answer_idx": number % len(choices)}
        return {**row, "qid": number, "q": f"Why {number}?", **choices, **answer}
    descs = [{"desc": f"Caption {k} of {number}.", "desc_id": k} for k in (0, 1)]
    if task == "yc2c":
        del row["ts"]
    return {**row, "clip_id": f"clip{number}", "descs": descs}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def glue_root(tmp_path_factory):
    """All tasks of GLUE in the files of the official release."""
    root = tmp_path_factory.mktemp("glue")
    for folder, columns, labels in (
        ("CoLA", "source label mark sentence", "01"),
        ("SST-2", "sentence label", "01"),
        ("MRPC", "Quality,#1 ID,#2 ID,#1 String,#2 String", "10"),
        ("QQP", "id qid1 qid2 question1 question2 is_duplicate", "01"),
        ("STS-B", "index genre sentence1 sentence2 score", "0.000 2.500 3.800 5.000"),
        ("MNLI", "index pairID sentence1 sentence2 label1 gold_label", "neutral entailment contradiction"),
        ("QNLI", "index question sentence label", "entailment not_entailment"),
        ("RTE", "index sentence1 sentence2 label", "not_entailment entailment"),
        ("WNLI", "index sentence1 sentence2 label", "01"),
    ):
        columns = columns.split("," if "," in columns else " ")
        labels = labels.split() if " " in labels else list(labels)
        (root / folder).mkdir()
        parts = ("_matched", "_mismatched") if folder == "MNLI" else ("",)
        for file, size in (("train", 12), *((f"{split}{part}", 6) for split in ("dev", "test") for part in parts)):
            names = columns if not file.startswith("test") else [c for c in columns if c != hidden(folder)]
            if folder == "CoLA" and file == "test":
                names = ["index", "sentence"]
            rows = [[cell(name, file, i, labels) for name in names] for i in range(size)]
            bare = folder == "CoLA" and file != "test"
            text = "".join("\t".join(row) + "\n" for row in ([] if bare else [names]) + rows)
            (root / folder / f"{file}.tsv").write_text(text)
    return root


def hidden(folder):
    return {"MRPC": "", "QQP": "is_duplicate", "STS-B": "score", "MNLI": "gold_label"}.get(folder, "label")


def cell(column, file, number, labels):
    if column in ("label", "Quality", "is_duplicate", "score", "gold_label"):
        return labels[number % len(labels)]
    return f'{column} "{number} of {file}'
