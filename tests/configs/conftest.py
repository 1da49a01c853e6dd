"""Small data on disk and a command line in this process, for the tests that run shipped configs."""

import csv
import json
import logging
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import fulgurite

CONFIGS = Path(fulgurite.__file__).parent / "configs"
WORDS = ("cat", "dog", "ball", "red")
TYPED = {"MSVD-QA", "MSRVTT-QA", "ActivityNet-QA", "TGIF-QA"}
SETS = {
    "iVQA": ("train.csv", "val.csv", "test.csv"),
    "MSVD-QA": ("train.csv", "val.csv", "test.csv"),
    "MSRVTT-QA": ("train.csv", "val.csv", "test.csv"),
    "LSMDC": ("training.csv", "val.csv", "test.csv"),
    "ActivityNet-QA": ("train.csv", "val.csv", "test.csv"),
    "TGIF-QA": ("train_frameqa.csv", "test_frameqa.csv"),
}


def write_clip(path, seed):
    """Four pictures of 64 x 64 with one moving box."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(4):
            picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            picture[8 * t : 8 * t + 24, 8:40, seed % 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def official_row(name, i):
    word = WORDS[i % 4]
    question = "the _____ moves." if name == "LSMDC" else "what is in the picture"
    row = {"video_id": f"v{i % 4}", "question": question}
    if name == "iVQA":
        row |= {f"answer{n}": word if n < 4 else "lamp" for n in range(1, 6)}
    else:
        row["answer"] = word
    return row | ({"type": str(i % 3)} if name in TYPED else {})


@pytest.fixture(scope="session")
def official_root(tmp_path_factory):
    """All six sets in the layout of FrozenBiLM, with CLIP features and the videos themselves."""
    root = tmp_path_factory.mktemp("DATA")
    (root / "vocab_6db.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    for number, (name, files) in enumerate(SETS.items()):
        folder = root / name
        (folder / "videos").mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        features = {f"v{i}": torch.randn(3 + i, 768, generator=generator).half() for i in range(4)}
        torch.save(features, folder / "clipvitl14.pth")
        (folder / "subtitles.pkl").write_bytes(pickle.dumps({"v0": "hello there", "v1": ""}))
        for i in range(4):
            write_clip(folder / "videos" / f"v{i}.mp4", 10 * number + i)
        for file in files:
            rows = [official_row(name, i) for i in range(32 if "train" in file else 5)]
            with open(folder / file, "w", newline="", encoding="utf-8") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return root


@pytest.fixture(scope="session")
def own_root(tmp_path_factory):
    """A user's folder: videos, questions with answers (two of the test ones ``grass``), and questions without."""
    root = tmp_path_factory.mktemp("own")
    for i in range(3):
        write_clip(root / f"{i}.mp4", i)
    answers = {"train": WORDS * 3, "val": WORDS, "test": ("grass", "cat", "grass", "dog", "ball", "red")}
    for split, words in answers.items():
        rows = [
            {"id": f"{split}{i}", "video": f"{i % 3}.mp4", "question": "What moves?", "answer": word}
            for i, word in enumerate(words)
        ]
        write_lines(root / f"{split}.jsonl", rows)
    write_lines(root / "questions.jsonl", [{"video": f"{i}.mp4", "question": "What is it?"} for i in range(3)])
    return root


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """Eight captioned pictures to train on, four for validation and test."""
    root = tmp_path_factory.mktemp("album")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
    for split, size in {"train": 8, "val": 4, "test": 4}.items():
        write_lines(root / f"{split}.jsonl", [{"image": f"{i}.png", "text": f"picture {i}"} for i in range(size)])
    return root


def call(*argv):
    """Run a command in this process with few words; gives the exit code."""
    from fulgurite.cli import main

    quiet = ("--trainer.enable_progress_bar=false", "--trainer.logger=false")
    threads = torch.get_num_threads()
    handlers = {name: logging.getLogger(name).handlers for name in ("lightning", "lightning.pytorch")}
    for name in handlers:  # they keep the stream of the test that imported Lightning, which is closed by now
        logging.getLogger(name).handlers = []
    torch.set_num_threads(1)
    try:
        return main([*map(str, argv), *quiet])
    finally:
        torch.set_num_threads(threads)
        for name, kept in handlers.items():
            logging.getLogger(name).handlers = kept


@pytest.fixture(scope="session")
def clip_writer():
    return write_clip


@pytest.fixture(scope="session")
def command():
    return call


@pytest.fixture(scope="session")
def configs():
    return CONFIGS


@pytest.fixture(scope="session")
def worlds_run(tmp_path_factory):
    """A finished run of the quickstart over two worlds with tiny encoders."""
    run = tmp_path_factory.mktemp("worlds") / "run"
    argv = ("--config", CONFIGS / "quickstart.yaml", "--config", CONFIGS / "tiny" / "prefix_encoder.yaml")
    stream = ("--data.epochs_per_domain=1", "--data.worlds=[grid, doom]")
    assert call("fit", *argv, *stream, "--run", run) == 0
    return run


def save_picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def facts_root(tmp_path_factory):
    """Three facts to delete in the layout of Facts, and the questions that a model learns them by."""
    root = tmp_path_factory.mktemp("facts")
    for i in range(6):
        save_picture(root / f"{i}.png", i)
    levels = ("easy", "medium", "hard")
    rows = [
        {
            "id": WORDS[i],
            "image": f"{i}.png",
            "question": "What is this?",
            "answer": WORDS[i],
            "subject": "drawing",
            "rephrased_questions": [f"What is shown {n}?" for n in range(4)],
            "rephrased_images": {level: [f"{i + 1}.png"] for level in levels},
            "neighbour_questions": [{"question": "Is it alive?", "answer": "yes"}],
            "neighbour_images": {level: [{"image": f"{i + 2}.png", "answer": "bus"}] for level in levels},
            "alternatives": ["fox"],
        }
        for i in range(3)
    ]
    write_lines(root / "facts.jsonl", rows)
    for split in ("train", "val", "test"):
        asked = [
            {"id": f"{split}{i}", **{key: rows[i][key] for key in ("image", "question", "answer")}} for i in (0, 1)
        ]
        write_lines(root / f"{split}.jsonl", asked)
    return root


@pytest.fixture(scope="session")
def unlok_root(tmp_path_factory):
    """Two records in the published layout of UnLOK-VQA."""
    root = tmp_path_factory.mktemp("unlok")
    records = [
        {
            "id": 17 + i,
            "image_id": 480208 + i,
            "src": "Which festival is this?",
            "subject": "cake",
            "pred": ("Easter", "Christmas")[i],
            "answers": [],
            "rephrase": [f"What do they celebrate {n}?" for n in range(4)],
            "loc": ["nq question: What is the cake on?"],
            "loc_ans": ["Table cloth"],
            "alt_ans": ["Birthday"],
            "objects_edit": ["bunny"],
            "neigh_idx": [0],
        }
        for i in range(2)
    ]
    (root / "unlok_vqa.json").write_text(json.dumps(records))
    for i in range(2):
        save_picture(root / "images" / f"{480208 + i:012}.jpg", i)
        for level in ("easy", "medium", "hard"):
            save_picture(root / f"rephrased_{level}" / f"{i}.jpg", 10 + i)
            save_picture(root / f"neighbours_{level}" / f"{i}_0.jpg", 20 + i)
    return root
