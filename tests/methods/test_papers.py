from fulgurite.methods.merging.karcher import Karcher
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.papers import papers_of


class Own:
    """As in arXiv 1234.56789, arXiv 2345.67890 and again arXiv 1234.56789."""


class Plain:
    """None of its own, nor in its file."""


def test_papers_are_those_of_the_class_else_of_its_file():
    assert papers_of(Own()) == ["arXiv 1234.56789", "arXiv 2345.67890"]
    assert papers_of(Plain()) == []
    assert papers_of(ModelStock()) == ["arXiv 2403.19522"]
    assert papers_of(Karcher()) == []
    assert papers_of(ModelStock(), Karcher(), Own(), ModelStock()) == [*papers_of(ModelStock()), *papers_of(Own())]
