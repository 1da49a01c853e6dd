"""What every objective and retain term must hold: exact under padding and sharing out, finite, nothing of nothing."""

import pytest
import torch
from objective_views import LENGTHS, OBJECTIVES, OfRetain, given, loss_and_gradients, rows_of, tensors

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.objectives import View

NAMES = pytest.mark.parametrize("name", OBJECTIVES)


def padded(view, left, right):
    """The same rows with padding on both sides, in which there is something that must not be read."""

    def wide(x):
        return torch.nn.functional.pad(x, (0, 0, left, right), value=7.0)

    labels = torch.nn.functional.pad(view.labels, (left, right), value=IGNORED)
    return View(wide(view.logits), labels, view.lens, wide(view.states))


@NAMES
@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (1, 2)])
def test_padding_of_any_length_on_any_side_changes_nothing(name, left, right):
    views, references = given(name)
    loss, gradients = loss_and_gradients(name, views, references)
    wide = OBJECTIVES[name](
        [padded(view, left, right) for view in views], [padded(reference, left, right) for reference in references]
    ).loss
    again = torch.autograd.grad(wide, tensors(views), allow_unused=True)
    torch.testing.assert_close(wide, loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, again):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@NAMES
def test_parts_of_a_batch_add_up_to_the_whole(name):
    views, references = given(name)
    loss, gradients = loss_and_gradients(name, views, references)
    parts = [
        OBJECTIVES[name]([rows_of(v, rows) for v in views], [rows_of(r, rows) for r in references])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    count = sum(part.counts.sum() for part in parts).item()
    torch.testing.assert_close(sum(part.totals.sum() for part in parts) / count, loss, rtol=1e-6, atol=1e-6)
    sums = [torch.autograd.grad(part.totals.sum() / count, tensors(views), allow_unused=True) for part in parts]
    for whole, *pieces in zip(gradients, *sums):
        if whole is not None:
            torch.testing.assert_close(sum(pieces), whole, rtol=1e-6, atol=1e-6)


@NAMES
def test_an_answer_without_tokens_adds_nothing(name):
    views, references = given(name, lengths=(3, 0, 4, 2))
    terms = OBJECTIVES[name](views, references)
    assert terms.totals[1] == terms.counts[1] == 0
    loss, gradients = loss_and_gradients(name, views, references)
    rest = [0, 2, 3]
    without = OBJECTIVES[name]([rows_of(v, rest) for v in views], [rows_of(r, rest) for r in references]).loss
    torch.testing.assert_close(loss, without)
    for gradient in gradients:
        assert gradient is None or not gradient[1].any()


@NAMES
def test_a_batch_of_empty_answers_has_loss_0(name):
    views, _ = given(name)
    for view in views:
        view.labels = torch.full_like(view.labels, IGNORED)
    loss, gradients = loss_and_gradients(name, views, views)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@NAMES
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_and_gradient_are_finite_up_to_a_loss_of_ten_thousand(name, sign):
    """Logits in which the answer's tokens stand 2,500 below the others, or above them."""
    views, references = given(name)
    for view, swap in [(view, sign) for view in views] + [(reference, -sign) for reference in references]:
        gap = torch.zeros_like(view.logits).scatter_(-1, view.labels.clamp(min=0)[..., None], -2500.0 * swap)
        view.logits = gap.requires_grad_()
        view.lens = (1000 * view.lens).log_softmax(-1).detach().requires_grad_()
    loss, gradients = loss_and_gradients(name, views, references)
    assert loss.isfinite()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@NAMES
def test_half_precision_is_read_in_float32(name):
    views, references = given(name)
    for view in views + references:
        view.logits, view.states = view.logits.bfloat16(), view.states.bfloat16()
    half = OBJECTIVES[name](views, references)
    for view in views + references:
        view.logits, view.states = view.logits.float(), view.states.float()
    full = OBJECTIVES[name](views, references)
    assert half.totals.dtype == half.counts.dtype == torch.float32
    torch.testing.assert_close(half.totals, full.totals, rtol=0, atol=0)


@NAMES
def test_a_row_counts_once_or_by_its_tokens(name):
    views, references = given(name)
    by_token = {"gradient ascent", "undial", "wga", "satimp", "retain nll", "retain kl"}
    expected = torch.tensor(LENGTHS) if name in by_token else torch.ones(len(LENGTHS))
    if name == "ceu":
        expected = torch.tensor(LENGTHS) - 1
    torch.testing.assert_close(OBJECTIVES[name](views, references).counts, expected.float())


@NAMES
def test_only_what_it_declares_is_read(name):
    objective = OBJECTIVES[name]
    declared = objective.term if isinstance(objective, OfRetain) else objective
    views, references = given(name)
    loss, gradients = loss_and_gradients(name, views, references)
    layers = getattr(declared, "layers", ())
    used = [declared.needs_logits, bool(layers), declared.state_layer is not None] * len(views)
    assert [gradient is not None for gradient in gradients] == used
    if not declared.needs_reference:
        assert torch.equal(objective(views, [None] * len(views)).loss, loss)
    elif getattr(declared, "keeps_nll", False):
        losses = [
            torch.nn.functional.cross_entropy(r.logits.transpose(1, 2), r.labels, reduction="none").sum(1)
            for r in references
        ]
        kept = [View(None, r.labels, nll=nll.detach()) for r, nll in zip(references, losses)]
        torch.testing.assert_close(objective(views, kept).loss, loss)


@NAMES
def test_the_reference_learns_nothing(name):
    views, references = given(name)
    loss = OBJECTIVES[name](views, references).loss
    found = torch.autograd.grad(loss, tensors(references), allow_unused=True)
    assert all(gradient is None for gradient in found)
