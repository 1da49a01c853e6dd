import math

import pytest
import torch
from torch.func import functional_call

from fulgurite.checkpoints import MismatchError, MissingError, load_tensors, read_manifest
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.modules.ada_merging import AdaMerging, entropy

DOMAINS = ("bars", "colours")


@pytest.fixture
def merging(experts, kit):
    """Build a merger of both experts."""

    def build(**settings):
        return AdaMerging(kit.encoder(), [str(experts[name][2]) for name in DOMAINS], **settings)

    return build


def states(experts, kit):
    """Encoders of base and experts, by parameter."""
    names = [name for name, _ in kit.classifier().encoder.named_parameters()]
    base = {name: p.detach() for name, p in kit.classifier().encoder.named_parameters()}
    each = [dict(experts[domain][0].encoder.named_parameters()) for domain in DOMAINS]
    return names, base, [{name: expert[name].detach() for name in names} for expert in each]


def test_the_start_is_task_arithmetic(merging, experts, kit):
    module = merging()
    module.prepare()
    base = {f"encoder.{n}": t for n, t in kit.classifier().encoder.state_dict().items() if t.is_floating_point()}
    each = [{name: load_tensors(experts[domain][2])[name] for name in base} for domain in DOMAINS]
    expected = TaskArithmetic(0.3)(each, base)
    found = module.merged_state()
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_features_are_those_of_the_merged_weights(merging, kit, experts):
    module = merging(level="task").eval()
    module.prepare()
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor([[0.7], [0.1]]))
    names, base, (first, second) = states(experts, kit)
    weights = {n: base[n] + 0.7 * (first[n] - base[n]) + 0.1 * (second[n] - base[n]) for n in names}
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = functional_call(module.encoder, weights, (pixels,)).squeeze(1)
    torch.testing.assert_close(module.features(pixels), reference, rtol=1e-4, atol=1e-5)


def test_coefficients_are_used_within_their_bounds(merging):
    module = merging(level="task")
    with torch.no_grad():
        module.coefficients.copy_(torch.tensor([[1.7], [-0.4]]))
    assert module.used_coefficients()[:, 0].tolist() == [1.0, 0.0]
    free = merging(level="task", clamp=False, initial=1.5)
    assert free.used_coefficients().unique().tolist() == [1.5]


@pytest.mark.parametrize("level", ["layer", "task"])
def test_only_coefficients_get_gradients_and_they_are_those_of_finite_differences(level, merging, kit, experts):
    module = merging(level=level)
    module.prepare()
    module.double().eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss():
        features = module.features(pixels)
        return sum(entropy_by_hand(module.heads[name](features)) for name in DOMAINS)

    module.zero_grad()
    loss().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["coefficients"]
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["coefficients"]
    for place in [(0, 0), (1, module.coefficients.shape[1] - 1)]:
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                module.coefficients[place] += step
                values.append(loss().item())
                module.coefficients[place] -= step
        assert module.coefficients.grad[place].item() == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-8
        )


def entropy_by_hand(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def test_entropy_of_a_sure_and_of_an_unsure_answer():
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([0.0, math.log(4)]))


def test_a_fit_lowers_the_entropy_and_writes_the_merged_classifier(merging, kit, experts, tmp_path):
    module, data = merging(), kit.tasks(adapt_to="test")
    run = kit.trainer(tmp_path, max_steps=40)
    module.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=2e-2)
    module.prepare()
    frozen = {name: value.clone() for name, value in module.named_buffers()}
    frozen |= {name: value.clone() for name, value in module.named_parameters() if name != "coefficients"}
    before = mean_entropy(module, data)
    run.fit(module, datamodule=data)
    assert mean_entropy(module, data) < before
    now = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    for name, value in frozen.items():
        assert torch.equal(now[name], value), name
    folder = tmp_path / "artefacts" / "merged-ada_merging"
    manifest = read_manifest(folder)
    assert manifest.kind == "self-contained"
    assert manifest.facts["adapted_to"] == "test pictures, without their labels"
    assert [parent["digest"] for parent in manifest.parents] == [read_manifest(experts[d][2]).digest for d in DOMAINS]
    table = manifest.facts["coefficients"]
    assert list(table) == module.names
    torch.testing.assert_close(torch.tensor(list(table.values())).T, module.used_coefficients().detach())
    merged = kit.classifier().eval()
    merged.restore(manifest.facts)
    merged.load_state_dict(load_tensors(folder))
    for domain in DOMAINS:
        torch.testing.assert_close(merged.heads[domain].weight, experts[domain][0].heads[domain].weight)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged.features(pixels), module.eval().features(pixels), rtol=1e-4, atol=1e-5)


def mean_entropy(module, data):
    data.attach(module.collator("fit"))
    loader = data.loader("test", data.samples("test"))
    with torch.no_grad():
        rows = [
            entropy(module.heads[domain](feature)).item()
            for batch in loader
            for domain, feature in zip(batch["domain"], module.eval().features(batch["pixels"]))
        ]
    data._collators.clear()
    return sum(rows) / len(rows)


def test_the_loss_is_the_sum_of_the_tasks_means(merging, kit, tmp_path):
    module, data = merging(), kit.tasks()
    losses = []
    module.log = lambda name, value, **options: losses.append((name, float(value)))
    module._trainer = kit.trainer(tmp_path)
    module.prepare()
    data.attach(module.collator("fit"))
    batch = {name: next(iter(loader)) for name, loader in data.train_dataloader().items()}
    assert list(batch) == list(DOMAINS)
    assert all(set(part["domain"]) == {name} and not any(part["answers"]) for name, part in batch.items())
    module.eval()
    loss = module.training_step(batch, 0)
    reference = sum(
        entropy_by_hand(module.heads[name](module.features(part["pixels"]))) for name, part in batch.items()
    )
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-6)
    assert [name for name, _ in losses] == ["train/entropy/bars", "train/entropy/colours", "train/loss"]


def test_the_second_form_takes_elected_task_vectors(merging, kit, experts):
    module = merging(density=0.2)
    module.prepare()
    names, base, each = states(experts, kit)
    kept = sum(int((getattr(module, f"tau_{i}") != 0).sum()) for i in range(len(names)))
    total = sum(base[name].numel() for name in names)
    assert 0 < kept <= 2 * int(0.2 * total)
    for i, name in enumerate(names):
        tau = getattr(module, f"tau_{i}")
        signs = tau.sign()
        assert not (signs[0] * signs[1] < 0).any()
        for number in range(2):
            exact = each[number][name] - base[name]
            assert torch.equal(tau[number][tau[number] != 0], exact[tau[number] != 0])


def test_checkpoints_hold_coefficients_and_go_on_with_the_same_experts(merging, kit, experts, tmp_path):
    run, module = kit.trainer(tmp_path, max_epochs=1), merging()
    run.fit(module, datamodule=kit.tasks())
    run.save_checkpoint(tmp_path / "checkpoint")
    assert list(load_tensors(tmp_path / "checkpoint")) == ["coefficients"]
    assert read_manifest(tmp_path / "checkpoint").kind == "delta"
    resumed = merging()
    kit.trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=kit.tasks(), ckpt_path=str(tmp_path / "checkpoint"))
    straight = merging()
    kit.trainer(tmp_path, max_epochs=2).fit(straight, datamodule=kit.tasks())
    assert torch.equal(resumed.coefficients, straight.coefficients)
    swapped = AdaMerging(kit.encoder(), [str(experts[name][2]) for name in reversed(DOMAINS)])
    with pytest.raises(MismatchError, match="other experts"):
        kit.trainer(tmp_path, max_epochs=2).fit(swapped, datamodule=kit.tasks(), ckpt_path=str(tmp_path / "checkpoint"))


def test_what_does_not_fit_is_refused(kit, experts, tmp_path):
    bars = str(experts["bars"][2])
    with pytest.raises(ValueError, match="two or more"):
        AdaMerging(kit.encoder(), [bars])
    with pytest.raises(ValueError, match="outside"):
        AdaMerging(kit.encoder(), [bars, bars], initial=1.2)
    with pytest.raises(MismatchError, match="another expert has a head for \\['bars'\\]"):
        AdaMerging(kit.encoder(), [bars, bars]).prepare()
    with pytest.raises(MissingError, match="no checkpoint at"):
        AdaMerging(kit.encoder(), [bars, str(tmp_path / "nothing")]).prepare()
    other = kit.encoder()
    next(other.parameters()).data.add_(0.1)
    with pytest.raises(MismatchError, match="give the experts' encoder"):
        AdaMerging(other, [bars, str(experts["colours"][2])]).prepare()
