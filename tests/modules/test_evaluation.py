"""Other weights are scored as a validation of their checkpoint would, and leave nothing behind."""

import copy

import pytest
import torch

from fulgurite.checkpoints import MismatchError
from fulgurite.modules.evaluation import Scored, evaluation_mode, other_values


class Little(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Little()


def doubled(module):
    return {name: value * 2 for name, value in module.state_dict().items()}


def test_values_are_others_inside_and_the_own_bits_after_even_after_an_error(module):
    own, others = copy.deepcopy(module.state_dict()), doubled(module)
    identities = [id(p) for p in module.parameters()]
    seen = []

    def inside():
        with other_values(module, others, "there"):
            seen.extend(torch.equal(value, others[name]) for name, value in module.state_dict().items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert len(seen) == len(own)
    assert all(seen)
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    assert [id(p) for p in module.parameters()] == identities
    assert all(p.requires_grad for p in module.parameters())


def test_gradients_stay(module):
    module.layer(torch.ones(4, 3)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    with other_values(module, doubled(module), "there"):
        pass
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_what_does_not_fit_is_named_before_anything_changes(module, change):
    own, others = copy.deepcopy(module.state_dict()), doubled(module)
    if change == "missing":
        del others["layer.0.bias"]
    if change == "unknown":
        others["layer.0.more"] = torch.ones(1)
    if change == "shape":
        others["layer.0.bias"] = torch.ones(5)
    fits = other_values(module, others, "there")
    with pytest.raises(MismatchError, match=r"there does not fit this Little in 1 tensors: layer\.0"):
        fits.__enter__()
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_every_submodule_gets_its_own_mode_back(module):
    module.layer[2].eval()
    with evaluation_mode(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.layer] == [True, True, False]


def test_the_modules_of_this_project_can_be_scored(make_module):
    from fulgurite.modules.video_qa import VideoQA

    assert isinstance(make_module(), Scored)
    assert isinstance(make_module(VideoQA), Scored)


def test_tied_tensors_are_replaced_under_each_of_their_names():
    module = torch.nn.ModuleDict({"embedding": torch.nn.Linear(3, 2, bias=False), "head": torch.nn.Linear(3, 2, False)})
    module["head"].weight = module["embedding"].weight
    own = module["head"].weight.detach().clone()
    with other_values(module, doubled(module), "there"):
        assert torch.equal(module["head"].weight, 2 * own)
        assert module["head"].weight is module["embedding"].weight
    assert torch.equal(module["head"].weight, own)
