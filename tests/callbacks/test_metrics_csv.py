from fulgurite.callbacks.metrics_csv import MetricsCSV, read_rows


def test_rows_and_columns_are_kept(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.5}, 0)
    logger.log_metrics({"b": 2}, 1)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,a,b", "0,1.5,", "1,,2.0"]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(4):
        first.log_metrics({"a": step}, step)
    first.finalize("failed")
    second = MetricsCSV(tmp_path)
    for step in range(2, 6):
        second.log_metrics({"a": 10 + step, "new": 0}, step)
    second.log_metrics({"b": 1}, 5)
    second.finalize("success")
    rows = read_rows(tmp_path / "metrics.csv")
    assert [float(row["a"]) for row in rows if "a" in row] == [0, 1, 12, 13, 14, 15]
    assert "new" not in rows[0]
    assert float(rows[-1]["b"]) == 1


def test_a_run_stopped_in_a_validation_keeps_the_training_row_of_that_step(tmp_path):
    first = MetricsCSV(tmp_path)
    first.log_metrics({"loss": 1.0, "epoch": 0}, 3)
    first.log_metrics({"val": 0.5, "epoch": 0}, 3)
    first.finalize("failed")
    second = MetricsCSV(tmp_path)
    second.log_metrics({"val": 0.25, "epoch": 0}, 3)
    second.log_metrics({"other": 7, "epoch": 0}, 3)
    second.finalize("success")
    rows = read_rows(tmp_path / "metrics.csv")
    assert [{k: float(v) for k, v in row.items() if k not in ("step", "epoch")} for row in rows] == [
        {"loss": 1.0},
        {"val": 0.25},
        {"other": 7.0},
    ]


def test_writes_are_rare_and_whole(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.written_at = float("inf")
    logger.log_metrics({"a": 1}, 0)
    logger.save()
    assert not (tmp_path / "metrics.csv").exists()
    logger.written_at = float("-inf")
    logger.save()
    assert len(read_rows(tmp_path / "metrics.csv")) == 1


def test_nothing_logged_leaves_no_file(tmp_path):
    MetricsCSV(tmp_path).finalize("success")
    assert not list(tmp_path.iterdir())
