"""Statistics of picture classifiers: two checkpoints of a fit merged by the data, against plain references."""

import pytest
import torch
from torch import nn

from fulgurite.callbacks.merge_statistics import Calibration
from fulgurite.callbacks.merge_step import Checkpoints, MergeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest
from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.regmean import RegMean
from fulgurite.modules.calibration import Calibrated

HEAD, CONVOLUTION = "heads.bars.weight", "encoder.model.conv_stem.weight"


@pytest.fixture(scope="module")
def two(kit, tmp_path_factory):
    """Two checkpoints of a fit, a builder of their modules, and the data."""
    folder = tmp_path_factory.mktemp("fit") / "checkpoints"
    data = kit.Toys("bars", batch_size=8)
    module, run = kit.classifier(), kit.trainer(folder, max_epochs=1)
    run.fit(module, datamodule=data)
    run.save_checkpoint(folder / "one")
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=data)
    run.save_checkpoint(folder / "two")

    def build(path):
        built = kit.classifier()
        built.restore(read_manifest(path).facts)
        built.load_state_dict(load_tensors(path))
        return built.eval()

    data = kit.Toys("bars", batch_size=8)
    data.attach(module.collator("validate"))
    return [folder / "one", folder / "two"], build, data


def merged(two, merger, tmp_path, **calibration):
    (_, last), build, data = two
    step = MergeAtCheckpoint(merger, Checkpoints(last=2), calibration=Calibration(**calibration))
    out = step([last], Context(tmp_path / "out", checkpoint=last, builder=build, data=data))
    return load_tensors(out), data.loader(
        "val", Context(out, data=data).calibration(**arguments(calibration)).dataset.samples
    )


def arguments(calibration):
    return {"num_samples": calibration["samples"], "seed": calibration.get("seed", 0)}


def test_what_has_no_gram_is_averaged(two, tmp_path):
    found, loader = merged(two, RegMean(), tmp_path, samples=9)
    paths, build, _ = two
    states, total, right = [load_tensors(path) for path in paths], 0, 0
    for path, state in zip(paths, states):
        module = build(path)
        with torch.no_grad():
            x = torch.cat([module.features(batch["pixels"]) for batch in loader]).double()
        gram = x.T @ x / len(x)
        gram = 0.9 * gram + 0.1 * gram.diagonal().diag()
        total, right = total + gram, right + gram @ state[HEAD].double().T
    torch.testing.assert_close(found[HEAD], torch.linalg.solve(total, right).T.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[CONVOLUTION], (states[0][CONVOLUTION] + states[1][CONVOLUTION]) / 2)


def test_fisher_weighs_all_weights(two, tmp_path):
    found, loader = merged(two, Fisher(favor_target=False, normalize=False), tmp_path, samples=3)
    paths, build, _ = two
    states, fishers = [load_tensors(path) for path in paths], []
    for path in paths:
        module, sums = build(path), {}
        for batch in loader:
            beliefs = module(batch).log_softmax(-1)
            for belief in beliefs.flatten():
                module.zero_grad()
                belief.backward(retain_graph=True)
                for name in (HEAD, CONVOLUTION):
                    squares = module.get_parameter(name).grad.double() ** 2 * belief.exp().detach() / 3
                    sums[name] = sums.get(name, 0) + squares
        fishers.append({name: tensor.clamp(min=1e-6) for name, tensor in sums.items()})
    for name in (HEAD, CONVOLUTION):
        shares = [fisher[name] for fisher in fishers]
        expected = sum(share * state[name] for share, state in zip(shares, states)) / sum(shares)
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-4, atol=1e-6)


def test_a_head_counts_its_own_pictures_and_answers_only_them(kit):
    module = kit.classifier()
    assert isinstance(module, Calibrated)
    module.build_heads(kit.labels)
    for head in module.heads.values():
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    samples = [sample for name in kit.labels for sample in kit.Toys(name).samples("train")[:2]]
    batch = module.collator("fit")(samples)
    inputs = module.calibration_inputs(batch)
    assert torch.equal(module.eval().answer_logits(inputs), module(batch))
    masks = {name: mask.tolist() for name, mask in module.token_masks(inputs).items()}
    assert masks == {r"heads\.bars": [True, True, False, False], r"heads\.colours": [False, False, True, True]}
