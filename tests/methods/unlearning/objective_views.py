"""Random views of a few rows, and every objective by name, for the tests of objectives."""

import torch

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.objectives import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    EmptyResponse,
    ErrorInjection,
    FactErasure,
    GradientAscent,
    HeadProjectionDefence,
    InputRephrasing,
    MaxEntropyDefence,
    RetainKL,
    RetainNLL,
    RetainStates,
    SatImp,
    SimNPO,
    View,
)

VOCABULARY, WIDTH = 11, 6
LENGTHS = (3, 1, 4, 2)


class OfRetain:
    """A retain term, called as objectives are."""

    def __init__(self, term):
        self.term = term

    def __call__(self, views, references):
        return self.term(views[0], references[0])


OBJECTIVES = {
    "fact erasure": FactErasure(),
    "empty response": EmptyResponse(),
    "error injection": ErrorInjection(),
    "head projection": HeadProjectionDefence([1, 2, 4], k=3),
    "max entropy": MaxEntropyDefence([1, 2, 4]),
    "input rephrasing": InputRephrasing(NPO(0.3)),
    "gradient ascent": GradientAscent(),
    "npo": NPO(0.5),
    "simnpo": SimNPO(2.5, 0.5),
    "dpo": DPO(0.2),
    "rmu": RMU(2, 3.0),
    "undial": UNDIAL(4.0),
    "wga": WGA(0.7),
    "satimp": SatImp(2.0, 1.5),
    "ceu": CEU(),
    "retain nll": OfRetain(RetainNLL()),
    "retain kl": OfRetain(RetainKL()),
    "retain states": OfRetain(RetainStates(2)),
}


def random_view(seed, lengths=LENGTHS, scale=2.0):
    """A view of all fields, with gradients; padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = len(lengths), max(lengths)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=generator)

    labels = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    return View(
        normal(rows, tokens, VOCABULARY).requires_grad_(),
        labels,
        normal(rows, 3, VOCABULARY).log_softmax(-1).requires_grad_(),
        normal(rows, tokens, WIDTH).requires_grad_(),
    )


def with_labels(view, labels):
    return View(view.logits, labels, view.lens, view.states)


def rows_of(view, rows):
    return View(view.logits[rows], view.labels[rows], view.lens[rows], view.states[rows])


def given(name, seed=0, **options):
    """Views and references as the objective wants them: two targets for DPO, the same rows for each."""
    count = 2 if name == "dpo" else 1
    views = [random_view(10 * seed + i, **options) for i in range(count)]
    references = [with_labels(random_view(10 * seed + 5 + i, **options), views[i].labels) for i in range(count)]
    return views, references


def tensors(views):
    return [tensor for view in views for tensor in (view.logits, view.lens, view.states)]


def loss_and_gradients(name, views, references):
    loss = OBJECTIVES[name](views, references).loss
    return loss, torch.autograd.grad(loss, tensors(views), allow_unused=True)
