"""Compression on two processes is that of one, and masks are kept whatever the strategy."""

import json
from pathlib import Path

import pytest
import torch

import fulgurite
from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.commands.statistics import data_of
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.quantization.storage import load_dense

SCRIPT = Path(__file__).with_name("compress_ranks.py")
CHAIN = """\
test_after_fit: false
data: {init_args: {epochs_per_domain: 1}}
trainer:
  num_sanity_val_steps: 0
  max_epochs: 1
  callbacks:
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: test
        steps:
          - class_path: PruneAtCheckpoint
            init_args: {pruner: {class_path: SparseGpt, init_args: {sparsity: 0.5}}, calibration: {samples: 13}}
          - {class_path: QuantizeAtCheckpoint, init_args: {quantizer: {class_path: Rtn, init_args: {bits: 4}}}}
"""


@pytest.fixture(scope="module")
def root(stream_config, tmp_path_factory, pair):
    """Runs ``ddp`` and ``fsdp2``, ``from`` that began with what the latter pruned, and ``<..>-masks``."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "plain.yaml").write_text(stream_config.read_text().replace("dropout: 0.2", "dropout: 0.0"))
    (root / "chain.yaml").write_text(CHAIN)
    texts = pair.run(SCRIPT, root, root / "plain.yaml", root / "chain.yaml")
    assert [(root / f"codes-{rank}").read_text() for rank in range(2)] == ["0 0 0 0"] * 2, texts[0][-6000:]
    return root


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_artefacts_are_those_of_one_process(strategy, root, tmp_path):
    run = root / strategy
    pruned, quantized = (next((run / "artefacts").glob(f"{kind}-*")) for kind in ("pruned", "quantized"))
    assert all(verify(path).ok for path in (pruned, quantized))
    last = run / "checkpoints" / "last"
    data = data_of(last, None, (), fulgurite.load(last))
    context = Context(tmp_path / "pruned", builder=fulgurite.load, data=data)
    step = PruneAtCheckpoint(SparseGpt(0.5), calibration=CalibrationSamples(13))
    one, two = load_dense(step([last], context)), load_dense(pruned)
    assert one.keys() == two.keys()
    names = read_manifest(pruned).facts["compressed"]
    assert len(names) == 12
    # Both see the same samples, in batches of other sizes, whose products are rounded otherwise: of two weights at the
    # threshold the other one may go, which changes its row alone. In float64 all masks are equal (test_walk_ranks.py).
    for name in names:
        moved = (one[name] != 0) != (two[name] != 0)
        assert moved.sum() <= 4
        same = ~moved.any(1)
        torch.testing.assert_close(one[name][same], two[name][same], rtol=1e-4, atol=1e-5)
    # Without statistics all is equal to the bit.
    out = QuantizeAtCheckpoint(Rtn(4))([pruned], Context(tmp_path / "quantized", builder=fulgurite.load))
    one, two = load_tensors(out), load_tensors(quantized)
    assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one.keys() | two.keys())
    scores = json.loads((run / "artefacts" / "scores.json").read_text())
    assert {entry["kind"] for entry in scores.values()} == {"pruned", "quantized"}
    assert not list((run / "artefacts").glob("*-blocks"))


def test_a_sharded_fit_that_starts_from_it_holds_its_backbone(root):
    (pruned,) = (root / "fsdp2" / "artefacts").glob("pruned-*")
    last = root / "from" / "checkpoints" / "last"
    assert (read_manifest(last).kind, read_manifest(last).base) == ("self-contained", None)
    assert read_manifest(last).facts["backbone_digest"] == read_manifest(pruned).facts["backbone_digest"]
    source, own = load_dense(pruned), load_dense(last)
    assert source.keys() == own.keys()
    frozen = [name for name in own if name.startswith("backbone.") and name != "backbone.answer_embeddings"]
    assert all(source[name].numpy().tobytes() == own[name].numpy().tobytes() for name in frozen)
    torch.testing.assert_close(source["backbone.answer_embeddings"], own["backbone.answer_embeddings"])
    module = fulgurite.load(last)
    assert module.base_digest == module.backbone.fingerprint


def test_masks_are_the_same_whatever_the_strategy(root):
    states = {
        name: load_tensors(root / f"{name}-masks" / "checkpoints" / "step=6") for name in ("ddp", "fsdp2", "resumed")
    }
    for state in states.values():
        assert not state["net.2.weight"][:, ::2].any()
        assert state["net.2.weight"][:, 1::2].all()
        assert state["net.0.weight"].count_nonzero() == 40 - round(0.7 * 40)
        torch.testing.assert_close(state, states["ddp"])
    assert all(torch.equal(states["fsdp2"][name], tensor) for name, tensor in states["resumed"].items())
