import json
from importlib.metadata import version

import lightning.pytorch as pl
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

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(0.5))


class Data(FulguriteDataModule):
    def read(self, split):
        return SAMPLES

    def info(self):
        return DataInfo(("d",))

    def setup(self, stage):
        pass

    def test_dataloader(self):
        return DataLoader([0, 1])


def trainer_of(folder, **options):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Report("A & B")],
        **options,
    )


def run(folder, module, **options):
    trainer_of(folder, **options).test(module, datamodule=Data(), verbose=False)


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


def test_a_table_of_metrics_is_printed_where_no_section_has_one(tmp_path, capsys):
    run(tmp_path, Silent())
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if "test/loss" in line] == [["test/loss", "0.2500"]]
    run(tmp_path, Answers())
    assert "test/accuracy" not in capsys.readouterr().out


def test_validate_prints_its_metrics_and_writes_nothing(tmp_path, capsys):
    trainer = trainer_of(tmp_path)
    trainer.validate(Silent(), DataLoader([0, 1]), verbose=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "val/loss" in line] == [
        ["val/loss", "0.5000"]
    ]
    assert list(tmp_path.iterdir()) == []
