import math

import pytest
import torch

from fulgurite.checkpoints import MismatchError, load_tensors, read_manifest
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.modules.classification import classes_of
from fulgurite.modules.image_classification import ImageClassifier
from fulgurite.samples import DataError, DataInfo


@pytest.fixture(scope="module")
def fitted(experts):
    return experts["bars"]


def test_all_weights_learn_and_the_pictures_are_told_apart(fitted, kit):
    module, run, _ = fitted
    start = dict(kit.encoder().named_parameters())
    for name, parameter in module.encoder.named_parameters():
        if "classifier" not in name:
            assert not torch.equal(parameter, start[name]), name
    assert run.callback_metrics["train/loss"] < 0.5 * math.log(3)
    (scores,) = run.test(module, datamodule=kit.Toys("bars"), verbose=False)
    assert scores["test/accuracy"] == scores["test/accuracy/bars"] > 0.8


def test_the_classifier_of_the_pretraining_is_gone_and_the_start_knows_nothing(kit):
    module = kit.classifier()
    assert not [name for name, _ in module.named_parameters() if "classifier" in name]
    module.build_heads({"bars": kit.labels["bars"]})
    features = torch.randn(4, module.encoder.width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.scores_of(features, ["bars"] * 4), torch.zeros(4, 3))


@pytest.mark.parametrize("statistics", ["batch", "pretrained"])
def test_statistics_of_normalisation_follow_the_batches_or_stay(statistics, kit, tmp_path):
    module, run = kit.classifier(statistics), kit.trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=1)
    modes = []
    module.on_train_batch_start = lambda *_: modes.append([layer.training for layer in layers])
    layers = [each for each in module.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    before = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    run.fit(module, datamodule=kit.Toys("bars", batch_size=8))
    assert len(modes) == 6
    assert all(mode == (statistics == "batch") for each in modes for mode in each)
    assert {int(layer.num_batches_tracked) for layer in layers} == {6 if statistics == "batch" else 0}
    same = [
        torch.equal(layer.running_mean, m) and torch.equal(layer.running_var, v)
        for layer, (m, v) in zip(layers, before)
    ]
    assert all(same) if statistics == "pretrained" else not any(same)
    assert not any(layer.training for layer in module.eval().modules())


def test_a_picture_is_scored_by_its_own_head_alone(kit):
    module = kit.classifier().eval()
    module.build_heads(kit.labels)
    for head in module.heads.values():
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    features = torch.randn(3, module.encoder.width, generator=torch.Generator().manual_seed(2))
    scores = module.scores_of(features, ["colours", "bars", "colours"])
    torch.testing.assert_close(scores[1, :3], module.heads["bars"](features[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[[0, 2], 3:], module.heads["colours"](features[[0, 2]]), rtol=1e-4, atol=1e-5)
    assert torch.isinf(scores[1, 3:]).all()
    assert torch.isinf(scores[[0, 2], :3]).all()


def test_the_loss_is_the_cross_entropy_of_the_own_head(fitted, kit):
    module, _, _ = fitted
    data = kit.Toys("bars", batch_size=8)
    data.attach(module.collator("fit"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.eval()
    labels = torch.tensor([kit.labels["bars"].index(next(iter(a))) for a in batch["answers"]])
    logits = module.heads["bars"](module.features(batch["pixels"]))
    reference = -(logits.log_softmax(-1)[range(8), labels]).mean()
    torch.testing.assert_close(module.classification_loss(batch), reference)


def test_the_checkpoint_stands_alone_and_gives_the_same_answers(fitted, tmp_path, kit):
    module, _, folder = fitted
    manifest = read_manifest(folder)
    assert manifest.kind == "self-contained"
    assert manifest.facts["classes"] == {"bars": list(kit.labels["bars"])}
    assert manifest.facts["pretrained"]["digest"] == kit.classifier().pretrained["digest"]
    assert load_tensors(folder).keys() == module.state_dict().keys()
    other = kit.classifier()
    predictions = kit.trainer(tmp_path).predict(other, datamodule=kit.Toys("bars"), ckpt_path=str(folder))
    rows = [row for batch in predictions for row in batch]
    assert [row["id"] for row in rows] == [f"predict-{i}" for i in range(5)]
    assert sum(row["answer"] == kit.labels["bars"][i % 3] for i, row in enumerate(rows)) >= 4
    assert all(0 < row["probability"] <= 1 and len(row["top"]) == 3 for row in rows)
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_fit_does_not_go_on_with_other_classes(fitted, tmp_path, kit):
    class Fewer(kit.Toys):
        def info(self):
            return DataInfo(("bars",), kit.labels["bars"][:2])

    with pytest.raises(MismatchError, match=r"bars: 3 .*built bars: 2"):
        kit.trainer(tmp_path, max_epochs=7).fit(kit.classifier(), datamodule=Fewer("bars"), ckpt_path=str(fitted[2]))


def test_several_domains_at_once_have_a_head_each(tmp_path, kit):
    data = ContinualDataModule([kit.Toys("bars"), kit.Toys("colours")], 1, joint=True, batch_size=8)
    assert classes_of(data) == kit.labels
    module, run = kit.classifier(), kit.trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    assert {name: head.out_features for name, head in module.heads.items()} == {"bars": 3, "colours": 2}
    assert {"val/accuracy/bars", "val/accuracy/colours"} <= run.callback_metrics.keys()
    with pytest.raises(DataError, match="no head for the pictures of \\['faces'\\]"):
        module.scores_of(torch.zeros(1, module.encoder.width), ["faces"])


def test_an_unknown_label_counts_as_wrong_and_trains_nothing(fitted):
    module, _, _ = fitted
    batch = {"domain": ["bars", "bars"], "answers": [{"round": 1.0}, {"down": 1.0}]}
    assert module.labels_of(batch).tolist() == [-1, 1]


def test_an_encoder_with_cells_is_refused():
    from fulgurite.backbones.frames import TimmFrameEncoder

    with pytest.raises(ValueError, match="set grid to 0"):
        ImageClassifier(TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2))


def test_a_domain_that_cannot_name_a_head_is_refused(kit):
    with pytest.raises(ValueError, match="leave out the dot"):
        kit.classifier().build_heads({"a.b": ("x", "y")})
    with pytest.raises(ValueError, match="two or more"):
        kit.classifier().build_heads({"a": ("x",)})
