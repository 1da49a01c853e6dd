import ast
import sys

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable

from fulgurite.commands.names import FOLDERS, ROOT, STRATEGY, class_table, complete, import_named


def test_the_table_holds_the_public_classes_that_the_syntax_trees_hold():
    expected = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "worlds" in file.relative_to(ROOT).parts:
                continue
            module = ".".join(("fulgurite", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
            for node in ast.parse(file.read_text()).body:
                frozen = "dataclass(frozen=True)" in map(ast.unparse, getattr(node, "decorator_list", ()))
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not frozen:
                    expected.setdefault(node.name, []).append(module)
    assert class_table() == expected
    assert class_table()["RunFolder"] == ["fulgurite.callbacks.run_folder"]


def test_a_short_name_stands_for_one_class():
    assert {name: modules for name, modules in class_table().items() if len(modules) > 1} == {}


def test_only_the_named_modules_are_imported(monkeypatch):
    for module in ("fulgurite.callbacks.rng", "fulgurite.callbacks.init_from"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    documents = [{"a": {"class_path": "RandomStates"}, "question": "Who is InitialWeights"}]
    assert import_named(["--x", "my.RunFolder"], documents) == ["fulgurite.callbacks.rng"]
    assert "fulgurite.callbacks.init_from" not in sys.modules
    assert import_named(["--kind={class_path: InitialWeights}"], []) == ["fulgurite.callbacks.init_from"]


def test_class_paths_are_completed_and_other_texts_stay():
    value = {"k": [{"class_path": "RandomStates"}, "RandomStates"], "class_path": "torch.nn.Linear"}
    full = {"k": [{"class_path": "fulgurite.callbacks.rng.RandomStates"}, "RandomStates"]}
    assert complete(value) == {**full, "class_path": "torch.nn.Linear"}
    assert complete({"class_path": "Nowhere"}) == {"class_path": "Nowhere"}


def test_an_optimizer_of_the_package_goes_by_its_name():
    document = {"optimizer": {"class_path": "BertAdam", "init_args": {"lr": 1e-4, "betas": [0.9, 0.95]}}}
    assert import_named([], [document]) == ["fulgurite.methods.optimizers.bert_adam"]
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    build = parser.instantiate_classes(parser.parse_object(complete(document))).optimizer
    group = build([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.95), 0.2)


def test_the_sharded_strategy_is_this_projects():
    ours = {"class_path": STRATEGY}
    assert complete({"trainer": {"strategy": "fsdp2"}}) == {"trainer": {"strategy": ours}}
    assert complete({"trainer.strategy": "ModelParallelStrategy"}) == {"trainer.strategy": ours}
    assert complete({"strategy": {"class_path": "ModelParallelStrategy"}}) == {"strategy": ours}
    assert complete({"trainer": {"strategy": "ddp"}}) == {"trainer": {"strategy": "ddp"}}
