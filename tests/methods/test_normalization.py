import pytest
import torch
from torch import nn

from fulgurite.methods.normalization import recompute_statistics


def inputs(count=4, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, 5, generator=generator) + 1 for _ in range(count)]


def test_the_first_layer_gets_the_mean_of_the_batches_moments():
    layer, batches = nn.BatchNorm1d(5, momentum=0.3), inputs()
    assert recompute_statistics(layer, batches) == 1
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert layer.momentum == 0.3
    assert layer.num_batches_tracked == len(batches)


def test_a_deeper_layer_sees_what_normalised_batches_give():
    torch.manual_seed(0)
    model, (batch,) = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3), nn.ReLU(), nn.BatchNorm1d(3)), inputs(1, 40)
    model.eval()
    recompute_statistics(model, [batch])
    scaled = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + model[0].eps).sqrt()
    features = model[2](model[1](scaled))
    torch.testing.assert_close(model[3].running_mean, features.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[3].running_var, features.var(0), rtol=1e-4, atol=1e-5)


def test_it_mends_the_scale_of_an_average_of_models():
    """Two networks whose features are unrelated: the variance of the average is half the average of the variances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator)
    layers = [nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)]
    models = []
    for layer in layers:
        nn.init.normal_(layer.weight, generator=generator)
        model = nn.Sequential(layer, nn.BatchNorm1d(8, affine=False))
        recompute_statistics(model, [x])
        models.append(model.eval())
    merged = nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, affine=False)).eval()
    first, second = (model.state_dict() for model in models)
    merged.load_state_dict({k: (first[k] + second[k]) / 2 if first[k].is_floating_point() else first[k] for k in first})
    assert merged(x).var(0).mean() < 0.75
    recompute_statistics(merged, [x])
    torch.testing.assert_close(merged(x).var(0), torch.ones(8), rtol=1e-3, atol=1e-3)


def test_modes_are_put_back_and_nothing_else_moves():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.LayerNorm(5))
    model.train()
    model[2].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    recompute_statistics(model, inputs())
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    reference = nn.BatchNorm1d(5)
    recompute_statistics(reference, [model[0](x).detach() for x in inputs()])
    torch.testing.assert_close(model[2].running_var, reference.running_var)  # so dropout was off


def test_a_failed_pass_keeps_the_old_statistics():
    layer = nn.BatchNorm1d(5)
    recompute_statistics(layer, inputs())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="no batch"):
        recompute_statistics(layer, [])
    with pytest.raises(RuntimeError):
        recompute_statistics(layer, [inputs()[0], torch.zeros(2, 7)])
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_a_model_without_such_layers_is_not_run():
    assert recompute_statistics(nn.Linear(5, 5), iter(())) == 0
