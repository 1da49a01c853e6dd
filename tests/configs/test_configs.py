"""Every shipped config is an experiment record, and runs a step of training, validation and test."""

import json
import re
from pathlib import Path

import pytest
import yaml

import fulgurite
from fulgurite.checkpoints import newest_checkpoint
from fulgurite.commands.yaml_loader import load_file

ROOT = Path(fulgurite.__file__).parent
SHIPPED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml"))
# test_merge_records.py runs those of merges, commands/test_compress_records.py those of pruning and quantization.
RECORDS = [
    p for p in SHIPPED if not re.search(r"cli\.py (merge|prune|quantize)", (ROOT / p).read_text(encoding="utf-8"))
]
TINY = {
    "PrefixEncoder": "configs/tiny/prefix_encoder.yaml",
    "FrozenBiLM": "configs/tiny/frozenbilm.yaml",
    "OpenClipVideoText": "configs/tiny/open_clip.yaml",
}
PICTURES = [  # which test_pictures.py runs
    "configs/merge/ada_merging.yaml",
    "configs/merge/picture_expert.yaml",
    "configs/tiny/image_encoder.yaml",
]
RETRIEVAL = [p for p in RECORDS if re.match(r"configs/(retrieval/|tiny/open_clip)", p)]  # test_retrieval_records.py
ADAPTERS = [p for p in RECORDS if re.match(r"configs/(adapters/|tiny/(vl|text|llava))", p)]  # test_adapter_records.py
UNLEARNING = [p for p in RECORDS if re.match(r"configs/(unlearning/|tiny/unlearning)", p)]  # test_unlearning_records.py
TWO_PROCESSES = ["configs/merge/stages.yaml"]  # by their strategy; here in one
OVERLAYS = [p for p in RECORDS if p not in (*TINY.values(), *PICTURES, *RETRIEVAL, *ADAPTERS, *UNLEARNING)]


def header(path):
    lines = (ROOT / path).read_text(encoding="utf-8").split("\n")
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def laid_over(path):
    """The configs of the command in the header, which ends with the config itself."""
    (command, *_) = re.findall(r"cli\.py (?:fit|test) (.*)", "\n".join(header(path)).replace("\n#   ", " "))
    return re.findall(r"--config (\S+\.yaml)", command)


def family(path):
    return load_file(ROOT / laid_over(path)[0])["model"]["init_args"]["backbone"]["class_path"]


@pytest.mark.parametrize("path", RECORDS)
def test_header_says_what_it_is_and_how_it_runs(path):
    lines = header(path)
    assert 3 <= len(lines) <= 6
    assert laid_over(path)[-1] == path
    assert all((ROOT / each).is_file() for each in laid_over(path))


@pytest.mark.parametrize("path", OVERLAYS)
@pytest.mark.usefixtures("compared_in_process")
def test_it_runs_a_step_under_its_tiny_overlay(path, command, official_root, own_root, tmp_path):
    base, *over = laid_over(path)
    chain = [base, TINY[family(path)], *over]  # the record's own settings stay on top of the tiny ones
    argv = [part for each in chain for part in ("--config", ROOT / each)]
    argv += {
        "configs/quickstart.yaml": ["--data.worlds=[grid, doom]", "--data.epochs_per_domain=1"],
        "configs/dam/six_domains.yaml": [f"--data.root={official_root}", "--data.epochs_per_domain=1"],
        "configs/own_videos.yaml": [f"--data.root={own_root}", "--trainer.max_epochs=1"],
    }[base]
    one_process = ["--trainer.devices=1", "--trainer.strategy=auto"] if path in TWO_PROCESSES else []
    run = tmp_path / "run"
    assert command("fit", *argv, *one_process, "--run", run, "--test_after_fit=true") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(0 <= metrics[name] <= 1 for name in ("val/accuracy", "test/accuracy"))
    manifest = json.loads((newest_checkpoint(run) / "manifest.json").read_text())
    assert manifest["facts"]["stage"] == len(manifest["facts"]["stages"]) - 1
    written = yaml.safe_load((run / "config.yaml").read_text())
    for overlay in over:
        for key, value in scalars(load_file(ROOT / overlay)):
            overridden = key[-1] == "epochs_per_domain" or (one_process and key[-1] in ("devices", "strategy"))
            assert overridden or look_up(written, key) == value, key


def scalars(value, path=()):
    if not isinstance(value, dict):
        return [] if isinstance(value, list) else [(path, value)]
    return [leaf for key, item in value.items() for leaf in scalars(item, (*path, key))]


def look_up(value, path):
    for key in path:
        value = value[key]
    return value
