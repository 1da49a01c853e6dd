"""Losses written out number by number, the gradients that the papers state, and what is scored and asked."""

import math

import pytest
import torch
from objective_views import random_view, with_labels

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.objectives import (
    CEU,
    DPO,
    NPO,
    UNDIAL,
    WGA,
    EmptyResponse,
    ErrorInjection,
    FactErasure,
    GradientAscent,
    InputRephrasing,
    RetainKL,
    RetainNLL,
    SatImp,
    SimNPO,
    View,
)
from fulgurite.methods.unlearning.objectives.ceu import without_true_token


def plain_softmax(numbers):
    largest = max(numbers)
    exponentials = [math.exp(number - largest) for number in numbers]
    return [exponential / sum(exponentials) for exponential in exponentials]


def plain_answers(view):
    """By row, the logits (V numbers) and the id of each answer token."""
    pairs = [list(zip(logits, labels)) for logits, labels in zip(view.logits.tolist(), view.labels.tolist())]
    return [[(logits, label) for logits, label in row if label != IGNORED] for row in pairs]


def plain_nll(view):
    return [sum(-math.log(plain_softmax(logits)[label]) for logits, label in row) for row in plain_answers(view)]


def cross(target, logits):
    return -sum(t * math.log(p) for t, p in zip(target, plain_softmax(logits)) if t)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.fixture
def view():
    return random_view(1)


@pytest.fixture
def reference(view):
    return with_labels(random_view(2), view.labels)


def loss(objective, view, reference=None):
    return objective([view], [reference]).loss


def gradient(value, view):
    return torch.autograd.grad(value, view.logits, retain_graph=True)[0]


def nll_and_weights(view, weights):
    """sum_r weight_r nll_r, of which the gradient is to be that of a loss."""
    each = torch.nn.functional.cross_entropy(view.logits.transpose(1, 2), view.labels, reduction="none").sum(1)
    return (each * torch.as_tensor(weights)).sum()


def test_losses_of_an_answer_written_out(view):
    nll, lengths = plain_nll(view), [len(row) for row in plain_answers(view)]
    mean = sum(nll) / sum(lengths)
    expected = {
        FactErasure(): sum(math.exp(-x) for x in nll) / 4,
        EmptyResponse(): sum(nll) / 4,
        ErrorInjection(): sum(nll) / 4,
        InputRephrasing(): sum(math.exp(-x) for x in nll) / 4,
        GradientAscent(): -mean,
        SimNPO(2.5, 0.5): -sum(2 / 2.5 * log_sigmoid(2.5 * (x / n - 0.5)) for x, n in zip(nll, lengths)) / 4,
    }
    for objective, value in expected.items():
        assert loss(objective, view).item() == pytest.approx(value, rel=1e-5), type(objective)
    assert RetainNLL()(view, None).loss.item() == pytest.approx(mean, rel=1e-5)


def test_losses_of_tokens_written_out(view, reference):
    tokens = [token for row in plain_answers(view) for token in row]
    late = [token for row in plain_answers(view) for token in row[1:]]
    before = [logits for row in plain_answers(reference) for logits, _ in row]
    known = [plain_softmax(logits)[label] for logits, label in tokens]

    def lowered(logits, label, by):
        return plain_softmax([z - by if v == label else z for v, z in enumerate(logits)])

    expected = {
        WGA(0.7): sum(p**0.7 * math.log(p) for p in known) / len(known),
        SatImp(2.0, 1.5): sum(p**2 * (1 - p) ** 1.5 * math.log(p) for p in known) / len(known),
        CEU(): sum(cross(lowered(z, y, math.inf), z) for z, y in late) / len(late),
        CEU(skip=0): sum(cross(lowered(z, y, math.inf), z) for z, y in tokens) / len(tokens),
        UNDIAL(4.0): sum(cross(lowered(old, y, 4.0), z) for old, (z, y) in zip(before, tokens)) / len(tokens),
    }
    for objective, value in expected.items():
        assert loss(objective, view, reference).item() == pytest.approx(value, rel=1e-5), type(objective)
    divergence = [
        sum(p * math.log(p / q) for p, q in zip(plain_softmax(old), plain_softmax(z)))
        for old, (z, _) in zip(before, tokens)
    ]
    kept = RetainKL()(view, reference).loss.item()
    assert kept == pytest.approx(sum(divergence) / len(divergence), rel=1e-5)


def test_preferences_written_out(view, reference):
    lose, lose_reference = random_view(3), random_view(4)
    lose_reference.labels = lose.labels
    gain = [
        (old_win - win) - (old_lost - lost)
        for win, old_win, lost, old_lost in zip(*map(plain_nll, (view, reference, lose, lose_reference)))
    ]
    found = DPO(0.2)([view, lose], [reference, lose_reference]).loss.item()
    assert found == pytest.approx(-2 / 0.2 * sum(log_sigmoid(0.2 * x) for x in gain) / 4, rel=1e-5)
    rise = [now - before for now, before in zip(plain_nll(view), plain_nll(reference))]
    expected = -2 / 0.5 * sum(log_sigmoid(0.5 * x) for x in rise) / 4
    assert loss(NPO(0.5), view, reference).item() == pytest.approx(expected, rel=1e-5)


def test_a_pair_of_which_either_has_no_answer_is_no_preference(view, reference):
    lose = random_view(3)
    whole = DPO(0.2)([view, lose], [reference, lose])
    view.labels[1], lose.labels[2] = IGNORED, IGNORED
    terms = DPO(0.2)([view, lose], [reference, lose])
    assert terms.counts.tolist() == [1, 0, 0, 1]
    assert terms.totals.tolist() == pytest.approx([whole.totals[0].item(), 0, 0, whole.totals[3].item()])


def test_npo_is_gradient_ascent_with_a_weight_that_fades(view, reference):
    rise = torch.tensor(plain_nll(view)) - torch.tensor(plain_nll(reference))
    found = gradient(loss(NPO(0.5), view, reference), view)
    weights = -2 * torch.sigmoid(-0.5 * rise) / 4
    torch.testing.assert_close(found, gradient(nll_and_weights(view, weights), view))
    forgotten = View(None, view.labels, nll=torch.zeros(4) - 1000)
    assert not gradient(loss(NPO(0.5), view, forgotten), view).any()


def test_npo_at_the_start_and_in_the_limit_of_small_beta(view, reference):
    start = loss(NPO(0.5), view, view)
    assert start.item() == pytest.approx(2 / 0.5 * math.log(2))
    ascent = gradient(nll_and_weights(view, [-0.25] * 4), view)
    torch.testing.assert_close(gradient(start, view), ascent)
    torch.testing.assert_close(gradient(loss(NPO(1e-5), view, reference), view), ascent, rtol=1e-3, atol=1e-5)


def test_simnpo_weighs_an_answer_by_its_mean_loss(view):
    nll, lengths = torch.tensor(plain_nll(view)), view.lengths
    weights = -2 * torch.sigmoid(-4.5 * nll / lengths) / (4 * lengths)
    torch.testing.assert_close(gradient(loss(SimNPO(), view), view), gradient(nll_and_weights(view, weights), view))


def test_the_gradient_of_fact_erasure_is_p_times_that_of_log_p(view):
    p = torch.tensor([math.exp(-x) for x in plain_nll(view)])
    found = gradient(loss(FactErasure(), view), view)
    torch.testing.assert_close(found, gradient(nll_and_weights(view, -p / 4), view))
    assert ((p >= 0) & (p <= 1)).all()


def test_fact_erasure_stops_where_gradient_ascent_goes_on(view):
    index = view.labels.clamp(min=0)[..., None]
    view.logits = view.logits.detach().scatter(-1, index, -300.0).requires_grad_()
    assert not gradient(loss(FactErasure(), view), view).any()
    assert gradient(loss(GradientAscent(), view), view).norm() > 0.1


def test_the_kl_term_is_0_at_the_start(view, reference):
    assert RetainKL()(view, view).loss.item() == pytest.approx(0, abs=1e-7)
    assert not gradient(RetainKL()(view, view).loss, view).abs().gt(1e-7).any()
    assert RetainKL()(view, reference).loss > 0


def test_the_target_of_ceu_gives_exactly_nothing_to_the_true_token(view):
    target = without_true_token(view)
    own = target.gather(-1, view.labels.clamp(min=0)[..., None])
    assert not own.any()
    torch.testing.assert_close(target.sum(-1), torch.ones(view.labels.shape))


def test_the_target_of_ceu_is_taken_as_given(view):
    late = view.labelled.cumsum(1) > 1
    pull = (view.logits.softmax(-1) - without_true_token(view)).detach() / 6  # answers of 3, 1, 4 and 2 tokens
    expected = pull.where((late & view.labelled)[..., None], 0.0)
    torch.testing.assert_close(gradient(loss(CEU(), view), view), expected)


def test_ceu_learns_nothing_of_answers_of_one_token_unless_told():
    short = random_view(1, lengths=(1, 1))
    assert CEU()([short], [None]).counts.sum() == 0
    assert CEU(skip=0)([short], [None]).counts.sum() == 2


def test_weights_of_the_weighted_ascents_learn_nothing(view):
    known = [[plain_softmax(z)[y] for z, y in row] for row in plain_answers(view)]
    losses = torch.nn.functional.cross_entropy(view.logits.transpose(1, 2), view.labels, reduction="none")
    weights = torch.zeros(4, 4)
    for row, values in enumerate(known):
        weights[row, : len(values)] = torch.tensor([p**2 * (1 - p) ** 1.5 for p in values]) / 10
    torch.testing.assert_close(gradient(loss(SatImp(2.0, 1.5), view), view), gradient(-(weights * losses).sum(), view))


def test_what_is_scored():
    alternatives = ("", " ", "rome", "oslo")
    assert FactErasure().targets("paris", alternatives) == ("paris",)
    assert EmptyResponse().targets("paris", ()) == ("I don't know",)
    assert ErrorInjection().targets("paris", alternatives) == ("rome",)
    assert DPO().targets("paris", alternatives) == ("I don't know", "paris")
    assert DPO(win="alternative").targets("paris", alternatives) == ("rome", "paris")
    assert InputRephrasing(ErrorInjection()).targets("paris", alternatives) == ("rome",)
    for objective in (ErrorInjection(), DPO(win="alternative")):
        with pytest.raises(ValueError, match="'paris' has no alternative"):
            objective.targets("paris", ("", "  "))


def test_scores_are_of_the_new_text_where_one_is_injected():
    assert [o.injects for o in (EmptyResponse(), ErrorInjection(), InputRephrasing(EmptyResponse()))] == [True] * 3
    assert [o.injects for o in (FactErasure(), DPO(), InputRephrasing(), NPO())] == [False] * 4


def test_what_is_asked():
    assert NPO().questions("where?", ("in which town?",)) == ("where?",)
    assert InputRephrasing().questions("a", ("b", "c", "d")) == ("a", "b", "c", "d")
    assert InputRephrasing(questions=2).questions("a", ("b", "c", "d")) == ("a", "b", "c")
    with pytest.raises(ValueError, match="no rephrasings of 'a'"):
        InputRephrasing().questions("a", ())


@pytest.mark.parametrize(
    "make",
    [
        lambda: NPO(0.0),
        lambda: SimNPO(-1.0),
        lambda: DPO(math.nan),
        lambda: DPO(win="both"),
        lambda: UNDIAL(0.0),
        lambda: WGA(0.0),
        lambda: SatImp(importance=0.0),
        lambda: CEU(-1),
        lambda: EmptyResponse(" "),
        lambda: InputRephrasing(questions=0),
    ],
)
def test_refused_options(make):
    with pytest.raises(ValueError, match=r"must|choose|give a text"):
        make()


def test_the_answer_itself_is_no_alternative():
    assert ErrorInjection().targets("Cake", ["", " cake ", "bread"]) == ("bread",)
    with pytest.raises(ValueError, match="no alternative"):
        ErrorInjection().targets("cake", ["Cake"])
