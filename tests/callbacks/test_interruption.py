"""Signals are noted, a second Ctrl-C is not, and a SLURM job is queued again."""

import os
import signal

import pytest

from fulgurite.callbacks.interruption import Interruption, requeue


def test_a_signal_is_noted_and_a_second_ctrl_c_interrupts(capfd):
    interruption, before = Interruption(), signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, interruption.note)
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping after this batch" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}, "16_3"),
    ],
)
def test_the_job_or_the_task_of_an_array_is_requeued(environment, job, monkeypatch, tmp_path):
    command = tmp_path / "scontrol"
    command.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert (tmp_path / "asked").read_text().split() == ["requeue", job]
