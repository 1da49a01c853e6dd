import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from fulgurite.callbacks.report import Report, in_order, show
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.reports import Section
from fulgurite.reports.tables import terminal_table
from fulgurite.samples import DataInfo, Sample

SAMPLES = [Sample(id=i, domain="d", question=f"{i}?") for i in ("b", "c", "a")]


class Answers(pl.LightningModule):
    """Answers backwards, so that the order of the data has to be restored."""

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", torch.tensor(0.5))

    def on_test_epoch_end(self):
        self.test_answers = [{"id": s.id, "domain": s.domain, "answers": {"m": "é"}} for s in reversed(SAMPLES)]

    def report_sections(self, samples):
        assert [a["id"] for a in self.test_answers] == [s.id for s in samples]
        return [Section("Mine", "<p>html</p>", files={"picture.png": b"png"}, printed="a [bold]table[/bold]")]


class Silent(pl.LightningModule):
    def test_step(self, batch, batch_idx):
        self.log("test/loss", torch.tensor(0.25))


class Data(FulguriteDataModule):
    def read(self, split):
        return SAMPLES

    def info(self):
        return DataInfo(("d",))

    def setup(self, stage):
        pass

    def test_dataloader(self):
        return DataLoader([0, 1])


def run(folder, module, **options):
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Report("A & B")],
        **options,
    )
    trainer.test(module, datamodule=Data(), verbose=False)


def test_writes_page_pictures_and_answers_in_order(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: <x>\nseed: 1\n")
    run(tmp_path, Answers())
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["b", "c", "a"]
    assert "é" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "picture.png").read_bytes() == b"png"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "<p>html</p>",
        "A &amp; B",
        "Answers on Data",
        "model: &lt;x&gt;",
        "test/accuracy",
        "0.5000",
    ):
        assert text in page
    assert f"torch {version('torch')}" in page
    printed = capsys.readouterr().out
    assert "a table" in printed
    assert f"report: {tmp_path / 'report.html'}" in printed


def test_wide_tables_lose_no_number(tmp_path, capsys):
    names = [f"domain{i:02d}" for i in range(20)]
    scores = {"average": 0.5, "forgetting": 0.0, "matrix": [[0.123] * 20]}
    results = {"modes": {"dynamic": scores}, "domains": names, "mode": "dynamic"}
    show([Section("t", "", printed=terminal_table(results, {}))], tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert printed.count(" 12.3") == 20
    assert all(f" {name} " in printed for name in names)


def test_module_that_contributes_nothing_gets_its_metrics(tmp_path):
    run(tmp_path, Silent())
    assert "test/loss" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "answers.jsonl").exists()


def test_trial_run_writes_nothing(tmp_path):
    run(tmp_path, Answers(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_no_sample_come_last():
    rows = [{"id": i, "domain": "d"} for i in ("z", "a", "y", "c")]
    assert [r["id"] for r in in_order(rows, SAMPLES)] == ["c", "a", "y", "z"]


SCRIPT = """
import json, os, torch.distributed as dist
from fulgurite.callbacks.report import gather
dist.init_process_group("gloo")
rank = dist.get_rank()
print(json.dumps(gather([{"id": f"{rank}-{i}"} for i in range(2 + rank)])))
"""


@pytest.mark.parametrize("world", [2])
def test_all_ranks_get_all_rows_of_uneven_ranks(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=common | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(world)
    ]
    outputs = [json.loads(r.communicate(timeout=120)[0]) for r in ranks]
    assert [row["id"] for row in outputs[0]] == ["0-0", "0-1", "1-0", "1-1", "1-2"]
    assert outputs[0] == outputs[1]
