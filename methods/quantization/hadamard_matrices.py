"""Hadamard matrices: K x K, +-1, H H^T = K I, made from their constructions and not from tables.

    Paley I      K = q + 1,     q = 3 mod 4 a prime power       H = I + [[0, 1], [-1, Q]]
    Paley II     K = 2 (q + 1), q = 1 mod 4 a prime power       H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]
    Williamson   K = 4 n, n = 23, 29, 39, 43                    four symmetric circulants, A^2 + B^2 + C^2 + D^2 = 4 n I
    Sylvester    from K to 2 K                                  [[H, H], [H, -H]]

Q_ab = chi(a - b), the quadratic character of the field with q elements; C = [[0, 1], [1, Q]].
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# First rows of the four circulants of order K / 4: Baumert, Golomb and Hall (1962) and Williamson (1944) found the
# first ones. Orders that no other construction here reaches.
WILLIAMSON = {
    92: ("+++++----+-++-+----++++", "++-+--+++--++--+++--+-+", "+-----++-+-++-+-++-----", "++-+-+++-++--++-+++-+-+"),
    116: (
        "+++--++-+-++------++-+-++--++",
        "++--++--+-++------++-+--++--+",
        "+++-+-++---+-++++-+---++-+-++",
        "+-+++++-+++-+----+-+++-+++++-",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
LARGEST_BASE = 1 << 10  # orders above are only made by doubling


def prime_power(number: int) -> tuple[int, int] | None:
    """(p, r) with ``number`` = p^r, if there are such."""
    if number < 2:
        return None
    prime = next((p for p in range(2, int(number**0.5) + 1) if number % p == 0), number)
    power = 0
    while number % prime == 0:
        number, power = number // prime, power + 1
    return (prime, power) if number == 1 else None


def field_elements(prime: int, power: int) -> tuple[np.ndarray, np.ndarray]:
    """All elements of the field with p^r, as (q, r) coefficients from the lowest, and an irreducible monic polynomial.

    The polynomial is the first one that no product of two of lower degree equals, as its r lower coefficients.
    """
    elements = np.array([digits[::-1] for digits in itertools.product(range(prime), repeat=power)])
    if power == 1:
        return elements, np.zeros(1, dtype=int)
    products = set()
    for degree in range(1, power // 2 + 1):
        for low, high in itertools.product(
            itertools.product(range(prime), repeat=degree), itertools.product(range(prime), repeat=power - degree)
        ):
            products.add(tuple(np.convolve([*low, 1], [*high, 1]) % prime))
    return elements, next(element for element in elements if (*element, 1) not in products)


def quadratic_character(order: int) -> np.ndarray:
    """(q, q): chi(a - b) of all pairs of elements of the field with ``order`` = q elements, q odd."""
    prime, power = prime_power(order)
    elements, modulus = field_elements(prime, power)
    place = prime ** np.arange(power)
    squares = set()
    for element in elements[1:]:
        product = np.convolve(element, element)
        for degree in range(len(product) - 1, power - 1, -1):
            product[degree - power : degree] -= product[degree] * modulus
            product[degree] = 0
        squares.add(int((product[:power] % prime) @ place))
    character = np.array([0] + [1 if number in squares else -1 for number in range(1, order)])
    difference = (elements[:, None] - elements[None]) % prime
    return character[difference @ place]


def bordered(corner: np.ndarray, sign: int) -> np.ndarray:
    """[[0, 1], [sign, corner]]."""
    out = np.zeros((len(corner) + 1,) * 2, dtype=np.int64)
    out[0, 1:], out[1:, 0], out[1:, 1:] = 1, sign, corner
    return out


def paley(order: int) -> np.ndarray | None:
    """Of this order by one of Paley's constructions, the first one before the second."""
    if (order - 1) % 4 == 3 and prime_power(order - 1):
        return np.eye(order, dtype=np.int64) + bordered(quadratic_character(order - 1), -1)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and prime_power(half - 1):
        conference = bordered(quadratic_character(half - 1), 1)
        identity = np.eye(half, dtype=np.int64)
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])
    return None


def williamson(order: int) -> np.ndarray:
    """Of an order in `WILLIAMSON`."""
    circulants = []
    for row in WILLIAMSON[order]:
        first = np.array([1 if sign == "+" else -1 for sign in row])
        circulants.append(np.stack([np.roll(first, shift) for shift in range(len(first))]))
    a, b, c, d = circulants
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def sylvester(size: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """(size, size), symmetric; ``size`` a power of 2."""
    matrix = torch.ones(1, 1, dtype=dtype)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def can_construct(order: int) -> bool:
    """Whether Paley or Williamson gives this order (above 2)."""
    if order in WILLIAMSON:
        return True
    half = order // 2
    return (
        order % 4 == 0
        and order <= LARGEST_BASE
        and bool(prime_power(order - 1) or ((half - 1) % 4 == 1 and prime_power(half - 1)))
    )


def split_size(size: int) -> tuple[int, int] | None:
    """(K, 2^m) with K 2^m = ``size``, K the smallest order that there is a matrix of (1 for powers of 2), or None."""
    if size < 1:
        return None
    odd, power = size, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    if odd == 1:
        return 1, power
    base = 4
    while base <= power:
        if can_construct(odd * base):
            return odd * base, power // base
        base *= 2
    return None


@lru_cache(maxsize=64)
def base_matrix(order: int) -> Tensor:
    """(order, order) int8 of Paley or Williamson, or [[1]].

    Raises:
        ValueError: none of them gives this order.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    found = williamson(order) if order in WILLIAMSON else paley(order)
    if found is None:
        raise ValueError(f"no construction of a Hadamard matrix of order {order} is known here")
    return torch.from_numpy(found.astype(np.int8))
