"""Classification of one text or two by a head, and labels that are written."""

import functools
import json

import pytest
import torch

from fulgurite.backbones.text_classifier import TextClassifier
from fulgurite.datamodules.glue import Glue
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.modules.text_task import TextTask
from fulgurite.samples import DataError, Sample

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ("good", "bad", "fine", "poor")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sentences of SST-2, pairs of MRPC and scores of STS-B, in the hub's columns."""
    folder = tmp_path_factory.mktemp("glue")
    for task in ("sst2", "mrpc", "stsb"):
        (folder / task).mkdir()
        for split, size in (("train", 24), ("validation", 7), ("test", 3)):
            rows = []
            for i in range(size):
                word, other = WORDS[i % 4], WORDS[(i + i // 4) % 4]
                texts = {"sentence": f"a {word} film"}
                if task != "sst2":
                    texts = {"sentence1": f"a {word} film", "sentence2": f"the film is {other}"}
                label = {"sst2": i % 2, "mrpc": int(word == other), "stsb": 5.0 * (word == other)}[task]
                rows.append({**texts, "label": -1 if split == "test" else label, "idx": i})
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def backbone(num_labels=2, **options):
    given = {"pretrained": False, "config": SHAPE, "train_dropout": "off"}
    return TextClassifier(num_labels=num_labels, **{**given, **options})


def head_and_lora():
    return [Placement(["query", "value"], functools.partial(LoRA, rank=2)), Placement(["head"], Replace)]


def mask(**options):
    given = {"density": 0.02, "samples": 6, "whole": [r"model\.classifier\..*"]}
    return [Placement(["parameters"], functools.partial(SparseMask, **{**given, **options}))]


def module(adapters=None, num_labels=2, lr=1e-2, **options):
    torch.manual_seed(0)
    return TextTask(backbone(num_labels, **options), adapters, optimizer=lambda g: torch.optim.AdamW(g, lr=lr))


@pytest.mark.parametrize(
    ("task", "labels", "figure"), [("sst2", 2, "accuracy"), ("mrpc", 2, "f1"), ("stsb", 1, "pearson")]
)
@pytest.mark.parametrize("adapters", [None, head_and_lora])
def test_each_kind_of_task_trains_and_is_judged(task, labels, figure, adapters, kit, root, tmp_path):
    model = module(adapters and adapters(), labels)
    data = Glue(root, task, form="pair", batch_size=8)
    trainer, steps = kit.trainer_of(tmp_path, max_epochs=2), kit.Steps()
    trainer.callbacks.append(steps)
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    assert result["test/score"] == pytest.approx(result[f"test/average/{task}"])
    assert f"test/{figure}/{task}" in result
    assert len(steps.losses) == 6
    rows = [row for batch in trainer.predict(model, datamodule=data) for row in batch]
    assert len(rows) == 3
    assert all((row["answer"] in "01") if labels == 2 else float(row["answer"]) < 99 for row in rows)


def test_words_are_learned(kit, root, tmp_path):
    model, data = module(), Glue(root, "sst2", form="pair", batch_size=8)
    trainer = kit.trainer_of(tmp_path, max_epochs=15, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    assert result["test/accuracy/sst2"] == 100


def test_a_mask_is_chosen_by_the_data_before_the_first_step_and_nothing_else_moves(kit, root, tmp_path):
    model, data = module(mask()), Glue(root, "mrpc", form="pair", batch_size=8)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    kit.trainer_of(tmp_path, limit_val_batches=0, limit_train_batches=2).fit(model, datamodule=data)
    (own,) = model.bank.adapters_of("live").values()
    (initial,) = model.bank.adapters_of("initial").values()
    assert own.is_scored
    assert torch.equal(own.positions, initial.positions)
    assert len(own.values) == int(0.02 * own.num_total)
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # The scores once more, sample by sample.
    sums = {name: torch.zeros_like(p) for name, p in model.backbone.named_parameters()}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:6].tolist()
    collator, samples = model.collator("fit"), data.samples("train")
    plain = module()
    plain.prepare(data.info(), data.stages())
    for place in order:
        batch = collator([samples[place]])
        plain.zero_grad()
        plain.losses(plain(batch), plain.targets(batch)).sum().backward()
        for name, parameter in plain.backbone.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    fresh = module(mask())
    (other,) = fresh.bank.adapters_of("live").values()
    other.set_scores({name: sums[name] for name in other.sizes})
    same = len(set(other.positions.tolist()) & set(own.positions.tolist())) / len(own.positions)
    assert same > 0.99


def test_bad_settings(kit, root, tmp_path):
    data = Glue(root, "sst2", form="pair", batch_size=8)
    with pytest.raises(DataError, match="num_labels=2"):
        kit.trainer_of(tmp_path).fit(module(num_labels=3), datamodule=data)
    scores = module(num_labels=1)
    scores.labels = ()
    with pytest.raises(DataError, match=r"samples \['a'\] have answers that are no scores .*'good'"):
        scores.targets({"id": ["a"], "answers": [{"good": 1.0}]})
    collator = backbone(max_tokens=4).collator("fit")
    with pytest.raises(DataError, match=r"'a' has 5 tokens; raise backbone.init_args.max_tokens=4"):
        collator([Sample(id="a", domain="d", question="a good film")])
    cut = backbone(max_tokens=4, long_text="cut").collator("fit")
    assert cut([Sample(id="a", domain="d", question="a good film")])["text"].shape == (1, 4)
    with pytest.raises(DataError, match="one text and two"):
        collator([Sample(id="a", domain="d", question="a"), Sample(id="b", domain="d", question="b", text_pair="c")])
    with pytest.raises(ValueError, match="pretrained: false"):
        TextClassifier(config=SHAPE)


def test_two_texts_are_told_apart_and_padding_changes_nothing():
    model = backbone()
    collator = model.collator("fit")
    short, long = (
        Sample(id=str(i), domain="d", question=text, text_pair="it is so")
        for i, text in enumerate(("a film", "a very good and rather long film"))
    )
    both = collator([short, long])
    assert both["segment"].max() == 1
    torch.testing.assert_close(model(both)[:1], model(collator([short])))
