"""What the command line and YAML know of every DataModule: its own options and those of its parents, with help."""

import contextlib
import io
import re

import jsonargparse
import pytest
import yaml

from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.datamodules.six_domains import SixDomains
from fulgurite.datamodules.video_qa import VideoQADataModule
from fulgurite.datamodules.worlds_data import Worlds

LOADING = {
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "seed",
    "on_bad",
    "feature_cache",
    "feature_dtype",
}
STREAM = {"epochs_per_domain", "joint", "validate"}
OFFICIAL = {
    "root",
    "vocabulary",
    "features_file",
    "features_name",
    "feature_width",
    "missing_features",
    "videos",
    "video_suffix",
    "subtitles",
    "held_out",
    "unknown_answers",
}
OWN = {"root", "train", "val", "test", "predict", "media", "domain", "vocabulary", "unknown_answers"}
OPTIONS = {
    ContinualDataModule: LOADING | STREAM | {"domains"},
    Worlds: LOADING | STREAM | {"worlds"},
    SixDomains: LOADING | STREAM | OFFICIAL | {"datasets"},
    VideoQADataModule: LOADING | OFFICIAL | {"dataset"},
    JsonlDataModule: LOADING | OWN,
}


def parser():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FulguriteDataModule, "data")
    return parser


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_all_options_are_listed_with_type_and_help(kind):
    single = jsonargparse.ArgumentParser(exit_on_error=False)
    single.add_class_arguments(kind, "data")
    actions = {action.dest.removeprefix("data."): action for action in single._actions}
    assert {name for name in actions if name not in ("data", "help", "domains.help")} == OPTIONS[kind]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        single.print_help()
    shown = " ".join(out.getvalue().split())
    for name in OPTIONS[kind] - {"domains"}:
        text = re.split(rf" --data\.{name}\+? (?:{name.upper()}|\{{[\w,]+\}}) ", shown)[-1].partition(" --data.")[0]
        assert "type: " in text, name
        assert len(text.partition("(")[0].split()) > 1, name


def test_flat_keys_arrive_and_an_unknown_one_is_refused():
    flat = {"worlds": ["grid"], "batch_size": 16, "on_bad": "skip", "epochs_per_domain": 6, "joint": True}
    text = yaml.safe_dump({"data": {"class_path": f"{Worlds.__module__}.Worlds", "init_args": flat}})
    built = parser().instantiate(parser().parse_string(text)).data
    assert (built.batch_size, built.eval_batch_size, built.on_bad) == (16, 16, "skip")
    assert (built.epochs, built.joint) == ([6], True)
    for unknown in ("batch_sizes", "stream", "loading", "domains"):
        with pytest.raises(jsonargparse.ArgumentError, match=unknown):
            parser().parse_string(text + f"    {unknown}: [1]\n")
    with pytest.raises(TypeError, match="batch_sizes"):
        Worlds(batch_sizes=3)


def test_folders_are_written_absolute(tmp_path, monkeypatch):
    """Relative to the working directory, also where a config in another folder names them."""
    options = {"root": "mine", "feature_cache": "cache"}
    config = {"data": {"class_path": f"{JsonlDataModule.__module__}.JsonlDataModule", "init_args": options}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    reader = parser()
    reader.add_argument("--config", action="config")
    parsed = reader.parse_args(["--config", "configs/own.yaml"])
    written = yaml.safe_load(reader.dump(parsed))["data"]["init_args"]
    assert (written["root"], written["feature_cache"]) == (str(tmp_path / "mine"), str(tmp_path / "cache"))
    built = reader.instantiate(parsed).data
    assert (built.root, built.feature_cache) == (tmp_path / "mine", tmp_path / "cache")
