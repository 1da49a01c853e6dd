"""``index`` and ``search`` with a tiny model of random weights."""

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fulgurite
from fulgurite.checkpoints import (
    DamagedError,
    MismatchError,
    MissingError,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.atomic import inject_faults
from fulgurite.cli import main
from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.modules.video_indexing import index_videos
from fulgurite.modules.video_search import search_videos
from fulgurite.modules.video_text_retrieval import VideoTextRetrieval
from fulgurite.samples import DataError, DataInfo, Sample, Stage, Video
from fulgurite.samples.video_index import Listing, Origin, Shards, VideoIndex, read_listing

QUERIES = ("a red box", "a green box on the left", "something")
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
BACKBONE = {"model": TINY, "pretrained": None, "num_frames": 3, "frame_rule": "uniform", "max_words": 12}
HEADS = {
    "ucofia": (Ucofia, {"max_frames": 3, "max_words": 12, "temporal_layers": 1}),
    "clip4clip": (Clip4Clip, {"max_frames": 3}),
}


def save_model(folder, head, **backbone):
    """A checkpoint as a fit would leave it."""
    from fulgurite.backbones.open_clip_video_text import OpenClipVideoText

    def named(each, settings):
        return {"class_path": f"{each.__module__}.{each.__qualname__}", "init_args": settings}

    each, settings = HEADS[head]
    backbone = BACKBONE | backbone
    torch.manual_seed(0)
    module = VideoTextRetrieval(OpenClipVideoText(**backbone), each(**settings))
    with torch.no_grad():  # towers with random weights give all videos nearly the same features
        for parameter in module.head.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    module.prepare(DataInfo(("d",)), [Stage("all", ("d",), 1, 1)])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    facts = checkpoint["fulgurite"]
    parts = {"backbone": named(OpenClipVideoText, backbone), "head": named(each, settings)}
    save_checkpoint_folder(
        folder,
        {"weights": module.state_dict()},
        kind=facts.pop("kind"),
        base=facts.pop("base"),
        settings={"model": named(VideoTextRetrieval, parts)},
        facts=facts,
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "ucofia", "ucofia")


@pytest.fixture(scope="module")
def module(model, one_thread):
    return fulgurite.load(model)


def test_a_whole_model_needs_no_longer_the_file_that_it_began_with(tmp_path):
    import open_clip

    torch.manual_seed(3)
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "clip.pt")
    saved = save_model(tmp_path / "saved", "clip4clip", pretrained=str(tmp_path / "clip.pt"))
    expected = fulgurite.load(saved).state_dict()
    (tmp_path / "clip.pt").unlink()
    found = fulgurite.load(saved).state_dict()
    assert found.keys() == expected.keys() == load_tensors(saved).keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match=r"clip\.pt"):  # elsewhere the file is asked for
        save_model(tmp_path / "again", "clip4clip", pretrained=str(tmp_path / "clip.pt"))


@pytest.fixture
def clips(stream_folder, tmp_path):
    """Six videos in each of two folders."""
    for name in ("red", "green"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for file in (stream_folder / name).glob("*.mp4"):
            shutil.copy(file, tmp_path / "clips" / name)
    return tmp_path / "clips"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def index(clips, out, module, model):
    """Brings the index up to date, in shards of four videos."""
    origin = Origin(read_manifest(model).digest, str(model), "float32")
    return functools.partial(index_videos, module, clips, out, origin, batch_size=2, shard_videos=5)


@pytest.fixture
def command(clips, out, model, monkeypatch, capsys, module):
    """Run ``index`` or ``search`` in this process; gives exit code, stdout and stderr. The model is loaded once."""
    from fulgurite.commands import loading

    def run(name, *argv):
        if name == "index":
            argv = (str(clips), f"--out={out}", "--num_workers=0", *argv)
            argv = argv if any(each.startswith("--model") for each in argv) else (*argv, f"--model={model}")
        else:
            argv = (*argv, f"--index={out}")
        code = main([name, *argv, "--device=cpu"])
        return code, *capsys.readouterr()

    monkeypatch.setattr(loading, "load", lambda *_: module)
    return run


def shards_of(path):
    return sorted(folder.name for folder in path.glob("shard-*"))


def scores_of_all(module, paths):
    """(L, Q, V) of one batch of all videos, without an index."""
    samples = [Sample(str(path), "d", task="retrieval", captions=("x",), video=Video(path)) for path in paths]
    with torch.no_grad():
        videos = module.head.embed_video(module.backbone.video_tokens(module.collator("predict")(samples)))
        texts = module.head.embed_text(module.backbone.text_tokens(module.backbone.caption_batch(QUERIES)))
        return module.head.similarity(texts, videos)


@pytest.mark.parametrize("head", HEADS)
def test_commands_find_what_scores_of_all_pairs_say(head, clips, out, tmp_path, capsys):
    model = save_model(tmp_path / head, head)
    given = [f"--model={model}", f"--out={out}", "--dtype=float32", "--num_workers=1", "--batch_size=5"]
    assert main(["index", str(clips), *given, "--device=cpu"]) == 0
    assert "12 files of 12 videos" in capsys.readouterr().out
    assert main(["search", *QUERIES, f"--index={out}", "--top=12", "--device=cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith(".mp4")]
    paths = sorted(clips.rglob("*.mp4"))
    levels = scores_of_all(fulgurite.load(model), paths)
    expected = levels.mean(0).sort(descending=True)
    for query in range(len(QUERIES)):
        for place, (rank, score, *rest, path) in enumerate(lines[12 * query : 12 * query + 12]):
            column = paths.index(Path(path))
            assert int(rank) == place + 1
            assert float(score) == pytest.approx(float(expected.values[query, place]), abs=2e-3)
            assert [float(each) for each in rest] == pytest.approx(levels[:, query, column].tolist(), abs=2e-3)
    assert len(lines) == 12 * len(QUERIES)


def test_candidates_are_those_of_the_coarse_level(index, module, out, clips):
    index()
    paths = sorted(clips.rglob("*.mp4"))
    levels = scores_of_all(module, paths)
    for query, hits in enumerate(search_videos(module, VideoIndex(out), QUERIES, top=3, candidates=3)):
        best = levels[0, query].topk(3).indices
        order = best[levels[:, query, best].mean(0).argsort(descending=True)]
        assert [hit.paths[0] for hit in hits] == [paths[column] for column in order]


def test_a_killed_run_goes_on_and_makes_the_same_index(index, out, tmp_path, module):
    points = []

    def kill(point):
        points.append(point)
        if points.count("before_manifest") == 2:
            raise KeyboardInterrupt

    (tmp_path / "clips" / "red" / "3.mp4").write_bytes(b"bad")
    skipping = functools.partial(index, on_bad="skip")
    with inject_faults(kill), pytest.raises(KeyboardInterrupt):
        skipping()
    assert shards_of(out) == ["shard-00000"]
    with pytest.raises(MissingError, match="cut short; run fulgurite index"):
        VideoIndex(out)
    assert skipping().computed == 11 - 4
    shutil.move(out, tmp_path / "first")
    assert skipping().computed == 11
    assert shards_of(out) == shards_of(tmp_path / "first") == ["shard-00000", "shard-00001", "shard-00002"]
    broken, whole = Shards(tmp_path / "first"), Shards(out)
    assert broken.places == whole.places
    assert read_listing(out) == read_listing(tmp_path / "first")
    for one, other in zip(broken.parts, whole.parts):
        assert one.tensors().keys() == {"video", "frames", "patches"}
        assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in other.tensors().items())
    assert skipping().computed == 0


def test_another_model_is_refused(command, index, model, tmp_path, out):
    index()
    other = save_model(tmp_path / "other", "ucofia")
    code, _, err = command("index", f"--model={other}", "--dtype=float32")
    assert code == 2
    assert f"{out} was made by {model}" in err
    assert f"not by {other}" in err
    code, _, err = command("search", "a box", f"--model={other}")
    assert code == 2
    assert f"--model {other} has the digest" in err
    code, _, err = command("index")
    assert code == 2
    assert "set --dtype float32" in err
    moved = shutil.copytree(model, tmp_path / "moved")
    assert command("search", "a box", f"--model={moved}")[0] == 0


def test_a_checkpoint_that_is_gone_is_asked_for(command, index, model, out, clips, module):
    lost = Origin(read_manifest(model).digest, "/nowhere/model", "float32")
    index_videos(module, clips, out, lost)
    code, _, err = command("search", "a box")
    assert code == 2
    assert "no longer there: name its place by --model" in err


@pytest.mark.parametrize("name", ["shard-00001/features.safetensors", "shard-00001/videos.json", "listing/videos.json"])
def test_a_flipped_byte_is_found_named_and_mended(name, index, out, command, module, capsys):
    index()
    before = search_videos(module, VideoIndex(out), QUERIES)
    data = bytearray((out / name).read_bytes())
    data[-7] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{name}.*Remove {out}/{Path(name).parent} and"):
        VideoIndex(out)
    code, _, err = command("index", "--dtype=float32")
    assert code == 2
    assert name in err
    assert main(["verify", str(out)]) == 2
    assert name in capsys.readouterr().out
    shutil.rmtree(out / Path(name).parent)
    with pytest.raises(MissingError, match="run fulgurite index"):
        VideoIndex(out)
    assert index().computed == (4 if name.startswith("shard") else 0)
    after = search_videos(module, VideoIndex(out), QUERIES)
    assert [[hit.paths for hit in hits] for hits in after] == [[hit.paths for hit in hits] for hits in before]
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "12 videos in 3 shards" in capsys.readouterr().out


def test_of_equal_scores_what_was_stored_first_comes_first(out):
    """In whole numbers, whose sums do not depend on how many are computed at once."""
    generator = torch.Generator().manual_seed(0)
    texts, one = (torch.randint(-3, 4, (n, 16), generator=generator).float() for n in (len(QUERIES), 1))
    exact = SimpleNamespace(
        device=torch.device("cpu"),
        backbone=SimpleNamespace(caption_batch=lambda *_: {}),
        head=SimpleNamespace(levels=("video_sentence", "other")),
        embed_captions=lambda _: TextFeatures(texts),
        levels_of=lambda texts, videos: (texts.sentence @ videos.video.T).expand(2, -1, -1),
    )
    shards, origin = Shards(out), Origin("xxh3_128:0", "m", "float32")
    shards.add(list("dbca"), VideoFeatures(one.expand(4, -1)), origin)
    shards.add(list("hefg"), VideoFeatures(one.expand(4, -1)), origin)
    shards.list_files(Listing({f"/{key}.mp4": key for key in "abcefgh"}), origin)
    for top, candidates in ((3, 3), (3, 5), (7, 100)):
        for hits in search_videos(exact, VideoIndex(out), QUERIES, top, candidates):
            assert "".join(hit.key for hit in hits) == "bcahefg"[:top]


def test_moved_and_equal_and_gone_files(index, clips, out, module, command):
    index()
    red = clips / "red"
    (clips / "new").mkdir()
    (red / "0.mp4").rename(clips / "new" / "moved.mp4")
    shutil.copy(red / "1.mp4", clips / "new" / "twin.mp4")
    gone = (red / "2.mp4").rename(clips.parent / "aside.mp4")
    result = index()
    assert (result.files, result.videos, result.computed) == (12, 11, 0)
    assert result.moved == {str(red / "0.mp4"): str(clips / "new" / "moved.mp4")}
    assert result.gone == [str(red / "2.mp4")]
    (hits,) = search_videos(module, VideoIndex(out), ["box"], 20)
    assert len(hits) == 11
    assert (clips / "new" / "twin.mp4", red / "1.mp4") in [hit.paths for hit in hits]
    gone.rename(red / "2.mp4")
    assert (index().computed, index().files) == (0, 13)
    code, printed, _ = command("search", "box", "--top=20")
    assert code == 0
    assert "The index has 12 videos: all are shown." in printed


def test_a_file_that_can_no_longer_be_read_is_no_longer_listed(index, clips, out):
    index()
    spoilt = clips / "red" / sorted(path.name for path in (clips / "red").iterdir())[0]
    spoilt.write_bytes(b"no video")
    found = index(on_bad="skip")
    listing = read_listing(out)
    assert str(spoilt) not in listing.files
    assert list(found.skipped) == list(listing.skipped) == [str(spoilt)]


def test_numbers_that_a_type_cannot_hold_are_not_stored(out):
    features = VideoFeatures(torch.tensor([[1.0, 2.0], [1.0, 1e6]]))
    with pytest.raises(DataError, match=r"digest two are not finite in float16; set --dtype float32"):
        Shards(out).add(["one", "two"], features, Origin("model", "somewhere", "float16"))
    assert not shards_of(out)
    Shards(out).add(["one", "two"], features, Origin("model", "somewhere", "float32"))


def test_shards_of_two_models_are_no_index(out, tmp_path):
    features = VideoFeatures(torch.ones(1, 2))
    for folder, digest in ((out, "one"), (tmp_path / "other", "two")):
        Shards(folder).add([digest], features, Origin(digest, "somewhere", "float32"))
    shutil.copytree(tmp_path / "other" / "shard-00000", out / "shard-00001")
    with pytest.raises(MismatchError, match="features of two models cannot be compared"):
        Shards(out)


def test_two_folders_share_an_index(module, model, clips, out):
    origin = Origin(read_manifest(model).digest, str(model))
    assert index_videos(module, clips / "red", out, origin).files == 6
    assert index_videos(module, clips / "green", out, origin).files == 12
    (clips / "red" / "0.mp4").unlink()
    result = index_videos(module, clips / "green", out, origin)
    assert (result.files, result.gone) == (11, [str(clips / "red" / "0.mp4")])


def test_unreadable_videos_stop_or_are_counted(command, clips, out):
    (clips / "green" / "a.mp4").write_bytes(b"no video")
    (clips / "green" / "b.mp4").write_bytes(b"no video")
    (clips / "green" / "c.mp4").write_bytes(b"")
    code, _, err = command("index")
    assert code == 2
    assert "c.mp4" in err
    assert "--on_bad skip" in err
    code, printed, err = command("index", "--on_bad=skip")
    assert code == 0
    assert "12 files of 12 videos" in printed
    assert "3 files cannot be read and are left out" in err
    assert sorted(Path(name).name for name in read_listing(out).skipped) == ["a.mp4", "b.mp4", "c.mp4"]


def test_the_page_has_thumbnails_or_says_why_not(command, index, clips, tmp_path):
    index()
    (clips / "red" / "0.mp4").unlink()
    shutil.copy(clips / "red" / "1.mp4", clips / "red" / "2.mp4")
    page = tmp_path / "page.html"
    code, printed, _ = command("search", "a <box>", "a box", "--top=12", f"--report={page}")
    assert code == 0
    assert f"report: {page}" in printed
    text = page.read_text()
    assert text.count("<h2>a &lt;box&gt;</h2>") == text.count("<h2>a box</h2>") == 1
    assert text.count('<article class="example">') == 2 * 12
    assert text.count("data:image/jpeg") == 2 * 10 * 4
    assert text.count("red/0.mp4: cannot read the video file") == 2
    assert text.count("red/2.mp4: the file has changed since it was indexed") == 2


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["a box", " "], "query 2 is empty"),
        (["word " * 40], "max_words is 12"),
        (["a box", "--top=0"], "top 0 of 100 candidates"),
        (["a box", "--top=5", "--candidates=4"], "top 5 of 4 candidates"),
    ],
)
def test_a_bad_query_is_one_message(command, index, argv, part):
    index()
    code, printed, err = command("search", *argv)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert part in err


def test_what_is_no_index_or_no_folder_of_videos_is_said(command, out, tmp_path, model, capsys):
    code, _, err = command("search", "a box")
    assert code == 2
    assert f"{out}: no index there" in err
    (tmp_path / "empty").mkdir()
    for folder, part in (("empty", "no file ending in .mp4"), ("nowhere", "no such folder")):
        assert main(["index", str(tmp_path / folder), f"--model={model}", f"--out={out}", "--device=cpu"]) == 2
        assert part in capsys.readouterr().err
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    code, _, err = command("index")
    assert code == 2
    assert "holds mine, which is no part of an index" in err
