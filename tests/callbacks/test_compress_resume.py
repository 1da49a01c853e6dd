"""Compression that is cut short goes on after the last whole block, and gives the same bits; one call at a time."""

import os
import shutil
import signal

import pytest

import fulgurite
from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.compress_step import blocks_folder
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import (
    CheckpointError,
    LockedError,
    load_tensors,
    read_manifest,
)
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq

CHAIN = """\
test_after_fit: false
data: {init_args: {epochs_per_domain: 1}}
trainer:
  num_sanity_val_steps: 0
  callbacks:
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: [val, test]
        steps:
          - {class_path: MergeAtCheckpoint, init_args: {merger: Average}}
          - class_path: PruneAtCheckpoint
            init_args: {pruner: {class_path: Wanda, init_args: {sparsity: 0.5}}, calibration: {samples: 23}}
          - class_path: QuantizeAtCheckpoint
            init_args:
              quantizer: {class_path: Gptq, init_args: {bits: 4, group_size: 16}}
              calibration: {samples: 23}
          - {class_path: ExportAtCheckpoint, init_args: {to: hf, adapters: separate}}
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(stream_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    (folder / "chain.yaml").write_text(CHAIN)
    argv = ("--config", str(stream_config), "--config", str(folder / "chain.yaml"), "--run", str(folder / "run"))
    assert main(["fit", *argv]) == 0
    return folder / "run"


def artefact(run, kind):
    (found,) = (run / "artefacts").glob(f"{kind}-*")
    return found


@pytest.fixture(scope="module")
def parts(run):
    """The merged artefact, its module and the data of the run."""
    merged = artefact(run, "merged")
    module = fulgurite.load(merged)
    return merged, module, data_of(merged, None, (), module)


def context_of(parts, out):
    return Context(out, builder=fulgurite.load, data=parts[2])


def equal(a, b):
    assert a.keys() == b.keys()
    return all(a[name].detach().numpy().tobytes() == b[name].detach().numpy().tobytes() for name in a)


@pytest.mark.parametrize("killed_at", [0, 1])
def test_a_kill_after_a_block_changes_nothing(killed_at, run, parts, tmp_path, monkeypatch):
    pruned = artefact(run, "pruned")
    step = QuantizeAtCheckpoint(Gptq(4, 16), calibration=CalibrationSamples(23))
    out, child = tmp_path / "killed", os.fork()
    if child == 0:
        plain, calls = SavedBlocks.save, []

        def save(self, done):
            plain(self, done)
            if len(calls) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(done.block.name)

        monkeypatch.setattr(SavedBlocks, "save", save)
        step([pruned], context_of(parts, out))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    blocks = [f"text.encoder.layer.{n}" for n in range(2)]
    assert sorted(p.name for p in blocks_folder(out).iterdir() if p.is_dir()) == blocks[: killed_at + 1]
    assert not out.exists()
    made, plain = [], Gptq.compress
    monkeypatch.setattr(Gptq, "compress", lambda self, name, *rest: (made.append(name), plain(self, name, *rest))[1])
    step([pruned], context_of(parts, out))
    assert len(made) == 6 * (1 - killed_at)
    whole = artefact(run, "quantized")
    assert equal(load_tensors(out), load_tensors(whole))
    figures = [
        [{k: v for k, v in each.items() if k != "seconds"} for each in read_manifest(path).facts["layers"]]
        for path in (out, whole)
    ]
    assert figures[0] == figures[1]
    assert not blocks_folder(out).exists()


def test_blocks_of_other_settings_or_damaged_ones_are_made_again(parts, tmp_path, monkeypatch):
    made, plain = [], Wanda.compress
    monkeypatch.setattr(Wanda, "compress", lambda self, name, *rest: (made.append(name), plain(self, name, *rest))[1])
    monkeypatch.setattr(SavedBlocks, "remove", lambda self: None)
    out = tmp_path / "out"
    steps = [PruneAtCheckpoint(Wanda(0.5), calibration=CalibrationSamples(n), name="w") for n in (4, 5)]
    for step, expected in ((steps[0], 12), (steps[0], 0), (steps[1], 12)):
        made.clear()
        shutil.rmtree(out, ignore_errors=True)
        step([parts[0]], context_of(parts, out))
        assert len(made) == expected
    file = blocks_folder(out) / "text.encoder.layer.1" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    first = load_tensors(out)
    first = {name: tensor.clone() for name, tensor in first.items()}
    shutil.rmtree(out)
    made.clear()
    steps[1]([parts[0]], context_of(parts, out))
    assert len(made) == 6
    assert equal(first, load_tensors(out))


def test_blocks_of_another_sparsity_or_of_other_answers_are_made_again(parts, tmp_path, monkeypatch):
    made, plain = [], Wanda.compress
    monkeypatch.setattr(Wanda, "compress", lambda self, name, *rest: (made.append(name), plain(self, name, *rest))[1])
    monkeypatch.setattr(SavedBlocks, "remove", lambda self: None)
    out = tmp_path / "out"

    def layers_made(sparsity):
        made.clear()
        shutil.rmtree(out, ignore_errors=True)
        step = PruneAtCheckpoint(Wanda(sparsity), calibration=CalibrationSamples(10), name="w")
        step([parts[0]], context_of(parts, out))
        return len(made)

    assert [layers_made(sparsity) for sparsity in (0.5, 0.5, 0.25, 0.25)] == [12, 0, 12, 0]
    kind = type(parts[1])
    answers = kind.answer_targets
    monkeypatch.setattr(kind, "answer_targets", lambda self, batch: answers(self, batch).flip(0))
    assert layers_made(0.25) == 12


def test_one_call_at_a_time_makes_an_artefact(parts, tmp_path, monkeypatch):
    out, plain = tmp_path / "out", SavedBlocks.save
    step = PruneAtCheckpoint(Magnitude(0.5))

    def save(self, done):
        with pytest.raises(LockedError, match=f"{blocks_folder(out)} is being written by process {os.getpid()}"):
            step([parts[0]], context_of(parts, out))
        plain(self, done)

    monkeypatch.setattr(SavedBlocks, "save", save)
    step([parts[0]], context_of(parts, out))
    monkeypatch.undo()
    first = load_tensors(out)

    def appears(self, done):
        plain(self, done)
        if not other.exists():
            shutil.copytree(out, other)

    other = tmp_path / "other"
    monkeypatch.setattr(SavedBlocks, "save", appears)
    with pytest.raises(CheckpointError, match="other was written by another process in the meantime"):
        PruneAtCheckpoint(Magnitude(0.25))([parts[0]], context_of(parts, other))
    assert equal(first, load_tensors(other))
    assert not list(blocks_folder(other).glob(".lock"))
    monkeypatch.setattr(SavedBlocks, "save", lambda self, done: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step([parts[0]], context_of(parts, tmp_path / "third"))
    assert not blocks_folder(tmp_path / "third").exists()
