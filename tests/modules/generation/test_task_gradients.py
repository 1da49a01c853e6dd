"""Gradients of adapters per task, as one process has them, on several that know each other's tasks."""

from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter
from fulgurite.methods.adapters.hyperformer import Hyperformer
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.adapters.sharing import Shared
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.task_gradients import TaskGradients

TASKS = ["a", "b", "c"]


@pytest.fixture
def gradients():
    """Of adapters with one up-layer for all tasks, beside one that knows no tasks."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    per_task = partial(PerTask, kind=partial(Bottleneck, reduction=2), tasks=TASKS, shared=["up"])
    placements = [Placement(["first"], per_task), Placement(["second"], partial(Bottleneck, reduction=2))]
    spec = ModelSpec(towers=(), points={"first": ("0", 1), "second": ("1", 1)})
    bank = AdapterBank(model, placements, ["kept"], spec=spec)
    return TaskGradients(bank), bank.adapters_of("live")["0"].adapters


def own(adapters, task):
    return list(adapters[task].down.parameters())


def test_every_tensor_knows_the_tasks_that_use_it(gradients):
    tasks, adapters = gradients
    expected = {p: {number} for number, task in enumerate(TASKS) for p in own(adapters, task)}
    expected |= {p: {0, 1, 2} for p in adapters["a"].up.parameters()}
    assert tasks.parameters() == expected


def test_a_part_of_all_sites_and_tasks_is_of_every_task():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    compacter = partial(Compacter, reduction=2, division=2, one_rule=True)
    per_task = partial(PerTask, kind=compacter, tasks=TASKS, shared=["rule"])
    placement = Placement(["all"], partial(Shared, kind=per_task, parts=["rule"]))
    bank = AdapterBank(layers, [placement], (), spec=ModelSpec(towers=(), points={"all": ("[01]", 2)}))
    found = TaskGradients(bank).parameters()
    assert found.keys() == set(bank.parameters_of("live"))
    assert [p.shape for p, tasks in found.items() if len(tasks) == 3] == [(2, 2, 2)]
    assert sum(len(tasks) == 1 for tasks in found.values()) == len(found) - 1


def test_embeddings_of_tasks_are_of_one_task_each():
    layers = nn.ModuleList([nn.Linear(4, 4)]).requires_grad_(False)
    placement = Placement(["all"], partial(Hyperformer, tasks=TASKS, reduction=2))
    bank = AdapterBank(layers, [placement], (), spec=ModelSpec(towers=(), points={"all": ("0", 1)}))
    (adapter,) = bank.adapters_of("live").values()
    assert TaskGradients(bank).parameters() == {adapter.task_embeddings[i]: {i} for i in range(3)}


def test_all_get_gradients_of_0_that_change_nothing(gradients):
    tasks, _ = gradients
    outputs = torch.randn(3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = tasks.with_all(outputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, outputs)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tasks.parameters())


def test_those_of_tasks_that_no_process_has_seen_since_the_last_step_are_taken_off(gradients):
    tasks, adapters = gradients

    def with_gradients():
        for parameter in tasks.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tasks.settle()
        return [task for task in TASKS if all(p.grad is not None for p in own(adapters, task))]

    elsewhere = torch.tensor([0.0, 2.0, 0.0])  # another process has two samples of b
    tasks.add(torch.tensor([0, 0]), lambda counts: counts + elsewhere)
    assert with_gradients() == ["a", "b"]
    tasks.add(torch.tensor([2]), lambda counts: counts)  # another batch of the same step
    assert with_gradients() == ["a", "b", "c"]
    tasks.clear()
    tasks.add(torch.tensor([2]), lambda counts: counts)
    assert with_gradients() == ["c"]
    assert all(p.grad is not None for p in adapters["a"].up.parameters())
    tasks.clear()
    assert with_gradients() == []
    assert all(p.grad is None for p in adapters["a"].up.parameters())
