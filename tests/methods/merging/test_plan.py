"""What is refused before anything is merged, because one of the models would silently lose."""

import pytest
import torch

from fulgurite.methods.merging.plan import Matching, plan_of


def tied(value):
    weight = torch.full((2, 3), float(value))
    return {"embed.weight": weight, "head.weight": weight}


def test_a_tie_that_only_some_models_have_is_refused():
    apart = {"embed.weight": torch.ones(2, 3), "head.weight": torch.full((2, 3), 5.0)}
    alike = {name: tensor.clone() for name, tensor in tied(2).items()}
    assert plan_of([alike, tied(3)], tied(0)).tied == {"head.weight": "embed.weight"}
    with pytest.raises(ValueError, match=r"head.weight: one tensor with embed.weight in the base, another in expert 1"):
        plan_of([alike, apart], tied(0))


@pytest.mark.parametrize("donor", [2, -1])
def test_a_donor_is_one_of_the_experts(donor):
    experts = [{"ids": torch.tensor([number])} for number in range(2)]
    assert plan_of(experts, None, Matching(donor=1)).copied["ids"] == 1
    with pytest.raises(ValueError, match=f"donor={donor}"):
        plan_of(experts, None, Matching(donor=donor))
