"""Pruning and quantization at a boundary: a chain in a fit, and its artefacts wherever a checkpoint goes."""

import json
import shutil

import lightning.pytorch as pl
import pytest
import torch

import fulgurite
from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.merge_step import MergeAtCheckpoint
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import (
    MismatchError,
    load_document,
    load_tensors,
    read_manifest,
    verify,
)
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.methods.pruning.magnitude import Magnitude, matrix_mask
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.rtn import Rtn, quantize_rtn
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.modules.evaluation import other_values, whole_where

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


def bare(module):
    """Embeddings of the answers by the backbone as it is."""
    kept = module.backbone.answer_embeddings
    with module.bank.use(None):
        module.backbone.set_answers(module.backbone.answers)
    found, module.backbone.answer_embeddings = module.backbone.answer_embeddings, kept
    return found


def logits(module, parts, count=3):
    samples = parts[2].samples("val")[:count]
    with torch.no_grad():
        return module(module.collator("validate")(samples)).logits


def test_artefacts_are_self_contained_with_lineage_and_figures(run):
    made = {kind: artefact(run, kind) for kind in ("merged", "pruned", "quantized", "exported")}
    assert all(verify(path).ok for path in made.values())
    for before, after, settings in (("merged", "pruned", "prune"), ("pruned", "quantized", "quantize")):
        manifest = read_manifest(made[after])
        assert (manifest.kind, manifest.base) == ("self-contained", None)
        assert manifest.parents == [{"path": str(made[before]), "digest": read_manifest(made[before]).digest}]
        assert {"merger", "prune", "quantize"} & manifest.settings.keys() == {settings}
        assert f"A model {after} from one checkpoint" in (made[after] / "README.md").read_text()
        assert len(manifest.facts["layers"]) == len(manifest.facts["compressed"]) == 12
        assert manifest.facts["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert manifest.facts["totals"]["bits"] == (16 if after == "pruned" else 4)
        assert manifest.facts["data"]["samples"] == 23
    assert not list((run / "artefacts").glob("*-blocks"))
    stored = load_tensors(made["quantized"])
    layer = "backbone.text.encoder.layer.0.output.dense.weight"  # (32, 64)
    assert layer not in stored
    assert stored[f"{layer}.integers"].nbytes == 32 * 64 // 2
    assert stored[f"{layer}.mask"].nbytes == 32 * 64 // 8


def test_wanda_prunes_by_the_inputs_of_examples_seen_one_at_a_time(run, parts):
    merged, module, data = parts
    samples = Context(merged, data=data).calibration(23, 0).dataset.samples
    assert len({(sample.domain, sample.id) for sample in samples}) == 23
    assert len({sample.domain for sample in samples}) == 3
    layer = module.backbone.text.encoder.layer[0].attention.self.query
    rows = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        for sample in samples:
            module(module.collator("validate")([sample]))  # one example has no padding
    hook.remove()
    scores = layer.weight.double().abs() * torch.cat(rows).square().sum(0).sqrt()
    name = "backbone.text.encoder.layer.0.attention.self.query.weight"
    pruned = load_dense(artefact(run, "pruned"))[name]
    expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :16], False)
    assert torch.equal(pruned != 0, expected)
    assert torch.equal(pruned[expected], layer.weight[expected])


def test_later_blocks_see_what_earlier_ones_have_become(run, parts):
    merged, _, data = parts
    samples = Context(merged, data=data).calibration(23, 0).dataset.samples
    module = fulgurite.load(artefact(run, "pruned"))
    layer = module.backbone.text.encoder.layer[1].attention.self.query
    rows = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        for sample in samples:
            module(module.collator("validate")([sample]))
    hook.remove()
    name = "backbone.text.encoder.layer.1.attention.self.query.weight"
    dense = parts[1].state_dict() | {f"backbone.{n}": t for n, t in parts[1].backbone.state_dict().items()}
    scores = dense[name].double().abs() * torch.cat(rows).square().sum(0).sqrt()
    expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :16], False)
    assert torch.equal(load_dense(artefact(run, "pruned"))[name] != 0, expected)


def test_pruned_weights_stay_zero_on_the_grid(run):
    pruned, quantized = (load_dense(artefact(run, kind)) for kind in ("pruned", "quantized"))
    names = read_manifest(artefact(run, "quantized")).facts["compressed"]
    for name in names:
        assert not quantized[name][pruned[name] == 0].any()
        assert not torch.equal(quantized[name], pruned[name])
    rest = [name for name in pruned if name not in names and name != "backbone.answer_embeddings"]
    assert len(rest) > 100
    assert all(pruned[name].numpy().tobytes() == quantized[name].numpy().tobytes() for name in rest)


def test_answers_are_embedded_by_the_compressed_backbone(run, parts):
    for kind in ("pruned", "quantized"):
        module = fulgurite.load(artefact(run, kind))
        torch.testing.assert_close(module.backbone.answer_embeddings, bare(module), rtol=0, atol=1e-6)
        assert not torch.allclose(module.backbone.answer_embeddings, parts[1].backbone.answer_embeddings, atol=1e-4)


def test_other_values_within_a_fit_are_those_of_the_artefact_and_all_is_put_back(run, parts):
    module = fulgurite.load(parts[0])
    own = {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    path = artefact(run, "quantized")
    with whole_where(module, True), other_values(module, load_dense(path), str(path)):
        inside = logits(module, parts)
    assert torch.equal(inside, logits(fulgurite.load(path), parts))
    assert not torch.allclose(inside, logits(module, parts), atol=1e-3)
    assert equal(own, dict([*module.named_parameters(), *module.named_buffers()]))
    assert not module.self_contained
    assert not any(name.startswith("backbone.") for name in module.state_dict())


@pytest.mark.parametrize("command", ["test", "predict"])
def test_the_command_line_takes_an_artefact(command, run, parts, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    path = artefact(copied, "quantized")
    assert main([command, "--ckpt_path", str(path)]) == 0
    (evaluation,) = (copied / "evaluations").iterdir()
    if command == "test":
        found = json.loads((evaluation / "metrics.json").read_text())
        own = json.loads((run / "artefacts" / "scores.json").read_text())[path.name]["scores"]
        assert own["test/accuracy"] == pytest.approx(found["test/accuracy"], abs=1e-6)
        return
    rows = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    module, samples = fulgurite.load(path), parts[2].samples("predict")
    with torch.no_grad():
        expected = module.predict_step(module.collator("predict")(samples), 0)
    assert [row["probability"] for row in rows] == pytest.approx([row["probability"] for row in expected], abs=3e-6)


def test_a_fit_starts_from_it_and_resumes_to_the_bit(run, stream_config, tmp_path):
    path = artefact(run, "pruned")
    source = load_dense(path)
    argv = ["fit", "--config", str(stream_config), "--test_after_fit", "false", "--data.epochs_per_domain", "1"]
    argv += ["--trainer.num_sanity_val_steps", "0", "--checkpoint.save_top_k", "-1"]
    argv += ["--checkpoint.every_n_epochs", "1", "--checkpoint.save_on_train_epoch_end", "true"]
    assert main([*argv, "--init_from", str(path), "--run", str(tmp_path / "run")]) == 0
    first, second, last = (next((tmp_path / "run" / "checkpoints").glob(f"*-step={step}")) for step in (2, 4, 6))
    for each in (first, last):
        assert (read_manifest(each).kind, read_manifest(each).base) == ("self-contained", None)
        tensors = load_tensors(each)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
        assert equal(own, {name: tensor for name, tensor in source.items() if name.startswith("backbone.")})
    live = "bank.sets.live.video_projection.module.weight"
    assert torch.equal(load_tensors(first)[live.replace("live", "initial")], source[live])
    assert not torch.equal(load_tensors(first)[live], source[live])
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for each in (again / "checkpoints").iterdir():
        if each.name not in (first.name, second.name):
            shutil.rmtree(each)
    assert main(["fit", "--resume", str(again)]) == 0
    assert equal(load_tensors(next((again / "checkpoints").glob("*-step=6"))), load_tensors(last))


def test_a_delta_over_another_backbone_does_not_start_it(run, parts, tmp_path):
    module = fulgurite.load(artefact(run, "pruned"))
    module.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.trainer.state.fn = "test"
    state = load_document(parts[0], "state")
    with pytest.raises(MismatchError, match="is a delta over"):
        module.on_load_checkpoint({"fulgurite": state["fulgurite"]})


def test_what_is_compressed_is_not_compressed_again(run, parts, tmp_path):
    pruned, quantized = artefact(run, "pruned"), artefact(run, "quantized")
    context = Context(tmp_path / "no", builder=fulgurite.load)
    with pytest.raises(ValueError, match=r"12 layers of .* are pruned already, first .*: prune the model that it was"):
        PruneAtCheckpoint(Magnitude(0.3))([pruned], context)
    with pytest.raises(ValueError, match=r"12 layers of .* are quantized already, first .*: quantize the model that"):
        QuantizeAtCheckpoint(Rtn(8))([quantized], context)
    assert not list(tmp_path.iterdir())


def test_nothing_pruned_is_the_source(parts, tmp_path):
    for number, step in enumerate(
        [
            PruneAtCheckpoint(Magnitude(0.0)),
            PruneAtCheckpoint(Wanda(0.0), calibration=CalibrationSamples(4)),
            QuantizeAtCheckpoint(Rtn(16)),
        ]
    ):
        out = step([parts[0]], Context(tmp_path / str(number), builder=fulgurite.load, data=parts[2]))
        module = fulgurite.load(out)
        assert equal(module.backbone.state_dict(), parts[1].backbone.state_dict())
        assert module.base_digest == parts[1].base_digest == parts[1].backbone.fingerprint
        assert torch.equal(logits(module, parts), logits(parts[1], parts))


def test_parts_are_compressed_one_after_the_other(parts, tmp_path):
    output, attention = r".*\.output\.dense", r".*attention\.self\..*"
    sequence = [
        QuantizeAtCheckpoint(Rtn(8, "channel"), layers=output, name="eight"),
        PruneAtCheckpoint(Magnitude(0.25), layers=attention),
        QuantizeAtCheckpoint(Rtn(3, 16, "asymmetric"), layers=attention, name="three"),
    ]
    source = parts[0]
    for number, step in enumerate(sequence):
        source = step([source], Context(tmp_path / str(number), builder=fulgurite.load))
    manifest = read_manifest(source)
    bits = {report["name"]: (report["bits"], report["sparsity"] > 0.2) for report in manifest.facts["layers"]}
    assert set(bits.values()) == {(8, False), (3, True)}
    assert len(bits) == 10  # both dense outputs and three projections of each of two blocks
    assert len(manifest.facts["compressed"]) == 10
    # Independent of storage: rounded and pruned by hand, in the order of the steps.
    dense = parts[1].backbone.state_dict()
    found = fulgurite.load(source).backbone.state_dict()
    for name in bits:
        weight = dense[f"{name}.weight"]
        if bits[name][0] == 8:
            expected = quantize_rtn(weight, 8, "channel", "symmetric").weight
        else:
            mask = matrix_mask(weight.abs(), 0.25)
            expected = quantize_rtn(weight * mask, 3, 16, "asymmetric").weight
            assert not found[f"{name}.weight"][~mask].any()
        assert torch.equal(found[f"{name}.weight"], expected), name
    with pytest.raises(ValueError, match=r"10 layers of .* are quantized, first .*: prune before you quantize"):
        PruneAtCheckpoint(Magnitude(0.5))([source], Context(tmp_path / "no", builder=fulgurite.load))
    assert not (tmp_path / "no").exists()


def test_what_cannot_work_is_refused(parts, stream_config, tmp_path, capfd):
    with pytest.raises(ValueError, match="wanda is measured on data: set calibration"):
        PruneAtCheckpoint(Wanda(0.5))
    with pytest.raises(ValueError, match="Rtn needs no inputs of layers: leave out calibration"):
        QuantizeAtCheckpoint(Rtn(), calibration=CalibrationSamples())
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        CalibrationSamples(0)
    context = Context(tmp_path / "out", builder=fulgurite.load)
    with pytest.raises(ValueError, match="compresses one checkpoint, and there are 2"):
        PruneAtCheckpoint(Magnitude(0.5))([parts[0], parts[0]], context)
    with pytest.raises(ValueError, match="layers='none' matches no linear layer"):
        PruneAtCheckpoint(Magnitude(0.5), layers="none")([parts[0]], context)
    with pytest.raises(ValueError, match=r"towers=\['image'\]: this model has \['text'\]"):
        PruneAtCheckpoint(Magnitude(0.5), towers=["image"])([parts[0]], context)
    with pytest.raises(ValueError, match="LightningModule has no blocks that can be compressed: take"):
        PruneAtCheckpoint(Magnitude(0.5))([parts[0]], Context(tmp_path / "out", builder=lambda _: pl.LightningModule()))
    (tmp_path / "chain.yaml").write_text(CHAIN.replace("23", "61"))
    argv = ("--config", str(stream_config), "--config", str(tmp_path / "chain.yaml"), "--run", str(tmp_path / "run"))
    assert main(["fit", *argv]) == 2
    assert "there are 60 training samples and 1 processes" in capfd.readouterr().err


def test_what_is_compressed_is_not_merged_by_files_and_its_sets_are(run, tmp_path, capfd):
    path = artefact(run, "quantized")
    argv = ("--out", str(tmp_path / "no"), "--merger", "Average")
    assert main(["merge", "--sources", f"[{path}, {path}]", *argv]) == 2
    assert "is pruned or quantized, which a merge would undo" in capfd.readouterr().err
    # Trained over a compressed backbone are adapter sets, and merged as such.
    out = MergeAtCheckpoint(TaskArithmetic(0.0))([path], Context(tmp_path / "merged"))
    before, after = load_dense(path), load_dense(out)
    sets = [name for name in before if name.startswith("bank.sets.red.")]
    assert all(torch.equal(after[name], before[name.replace(".red.", ".initial.")]) for name in sets)
    rest = [name for name in before if not name.startswith("bank.sets.")]
    assert equal({name: before[name] for name in rest}, {name: after[name] for name in rest})
    assert torch.equal(fulgurite.load(out).backbone.answer_embeddings, fulgurite.load(path).backbone.answer_embeddings)
