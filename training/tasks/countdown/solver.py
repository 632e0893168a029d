"""Which values can be made of some integers, each used once: exact, by dynamic programming over subsets.

There are two arithmetics. In the game's own, rational one, intermediates may be fractional or negative. In the integer
one, which the tiny model searches, every intermediate is a positive integer of at most `limit` and every division is
exact.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import gcd

Ratio = tuple[int, int]  # numerator and denominator, in lowest terms, both non-negative


def _halves(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All unordered ways to part a sorted tuple in two non-empty sorted tuples."""
    first, rest = items[0], items[1:]
    for size in range(len(rest)):
        for chosen in combinations(range(len(rest)), size):
            left = (first, *(rest[i] for i in chosen))
            right = tuple(value for i, value in enumerate(rest) if i not in chosen)
            yield left, right


def _ratio(numerator: int, denominator: int) -> Ratio:
    divisor = gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor


@lru_cache(maxsize=65_536)
def _rational_values(items: tuple[int, ...]) -> frozenset[Ratio]:
    """All absolute values of expressions over `items`.

    Signs need not be tracked: the absolute value of a sum or a difference is the sum or the absolute
    difference of absolute values. And where an expression over positive numbers is negative, it holds a
    subtraction that can be turned round, so the absolute value can be reached too.
    """
    if len(items) == 1:
        return frozenset({(items[0], 1)})
    found: set[Ratio] = set()
    for left, right in _halves(items):
        for a, b in _rational_values(left):
            for c, d in _rational_values(right):
                found.add(_ratio(a * d + c * b, b * d))
                found.add(_ratio(abs(a * d - c * b), b * d))
                found.add(_ratio(a * c, b * d))
                if c:
                    found.add(_ratio(a * d, b * c))
                if a:
                    found.add(_ratio(b * c, a * d))
    return frozenset(found)


def integer_steps(a: int, b: int, limit: int) -> Iterator[tuple[int, str, int, int]]:
    """The steps `(x, operator, y, value)` from two positive integers to a value in 1..`limit`."""
    high, low = max(a, b), min(a, b)
    if a + b <= limit:
        yield a, "+", b, a + b
    if high > low:
        yield high, "-", low, high - low
    if a * b <= limit:
        yield a, "*", b, a * b
    if high % low == 0:
        yield high, "/", low, high // low


@lru_cache(maxsize=65_536)
def _integer_values(items: tuple[int, ...], limit: int) -> frozenset[int]:
    if len(items) == 1:
        return frozenset(items)
    found: set[int] = set()
    for left, right in _halves(items):
        for a in _integer_values(left, limit):
            for b in _integer_values(right, limit):
                found.update(step[3] for step in integer_steps(a, b, limit))
    return frozenset(found)


def reachable(numbers: list[int] | tuple[int, ...], limit: int | None = None) -> frozenset[int]:
    """The non-negative integers that can be made of all the given positive integers, each used once.

    Args:
        numbers: one to six positive integers.
        limit: None for the game's rational arithmetic; else the largest intermediate of integer arithmetic.
    """
    if not 1 <= len(numbers) <= 6 or min(numbers) < 1:
        raise ValueError(f"numbers must be one to six positive integers, got {numbers!r}")
    items = tuple(sorted(numbers))
    if limit is not None:
        return _integer_values(items, limit)
    return frozenset(a for a, b in _rational_values(items) if b == 1)
