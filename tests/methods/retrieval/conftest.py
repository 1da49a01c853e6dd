"""The aggregation of UCoFiA as a loop over numbers."""

import math

import pytest


def plain_softmax(values):
    largest = max(values)
    exponentials = [math.exp(v - largest) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def plain_isa(x, matrix, temperature, kept=None):
    """ISA of one list of numbers; ``kept`` says which count."""
    x = [float(v) for v in x]
    counted = [j for j in range(len(x)) if kept is None or kept[j]]
    first = plain_softmax([x[j] / temperature for j in counted])
    second = plain_softmax(
        [sum(a * float(matrix[i, j]) for a, i in zip(first, counted)) / temperature for j in counted]
    )
    return sum(weight * x[j] for weight, j in zip(second, counted))


@pytest.fixture
def isa_of_a_list():
    return plain_isa
