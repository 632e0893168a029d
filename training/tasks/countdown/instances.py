"""The puzzles of Countdown, generated in three splits that cannot overlap."""

import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations_with_replacement
from math import comb
from typing import TypedDict, get_args

from ...task import SplitName
from .solver import reachable


class Puzzle(TypedDict):
    """An instance."""

    numbers: list[int]
    target: int


@dataclass(frozen=True)
class Level:
    """The ranges of a difficulty.

    `limit` None means that instances are solvable in rational arithmetic; a number means that they are
    solvable with positive integer intermediates of at most that size, which is what the tiny model's
    vocabulary can write.
    """

    max_number: int
    max_target: int
    limit: int | None


LEVELS = {
    # TinyZero's published set draws numbers and targets of up to 100.
    "paper": Level(max_number=100, max_target=100, limit=None),
    "tiny": Level(max_number=12, max_target=60, limit=98),
}

# Shares of the multisets of numbers, in percent. They are large because the tiny level's three-number pool is
# small: a fifth of it is what holds 512 test instances.
_TEST_PERCENT, _VALIDATION_PERCENT = 20, 20
_ENUMERABLE = 20_000  # multisets; a smaller pool is listed completely, so that its size is known exactly
_JOIN = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}  # "/" where exact
_DRAWS_PER_INSTANCE = 400  # random draws before a large pool counts as exhausted


def split_of(numbers: Sequence[int]) -> SplitName:
    """The split a multiset of numbers belongs to: a stable hash of the sorted numbers, nothing else.

    So it does not depend on the target, on the size of a split, or on the level, and no multiset is in two
    splits.
    """
    key = ",".join(str(number) for number in sorted(numbers)).encode()
    bucket = int.from_bytes(blake2b(key, digest_size=8).digest(), "big") % 100
    if bucket < _TEST_PERCENT:
        return "test"
    return "validation" if bucket < _TEST_PERCENT + _VALIDATION_PERCENT else "train"


def _enumerated(name: str, count: int, level: Level, rng: random.Random) -> Iterator[Puzzle]:
    """Every instance of a small pool, in a fixed random order, the numbers of each in random order."""
    pool = [
        (items, target)
        for items in combinations_with_replacement(range(1, level.max_number + 1), count)
        if split_of(items) == name
        for target in sorted(reachable(items, level.limit))
        if 1 <= target <= level.max_target and target not in items
    ]
    rng.shuffle(pool)
    for items, target in pool:
        yield {"numbers": rng.sample(items, count), "target": target}


def _drawn(name: str, count: int, level: Level, rng: random.Random, draws: int) -> Iterator[Puzzle]:
    """Distinct instances of a large pool: draw numbers, join random pairs, keep the value if it is in range.

    The expression that made it shows that an instance is solvable; nothing is searched, so 20,000 take
    seconds. Pairs are joined in exact integers (a division only where it is exact): a subset of what the
    verifier accepts.
    """
    seen: set[tuple[tuple[int, ...], int]] = set()
    for _ in range(draws):
        numbers = [rng.randint(1, level.max_number) for _ in range(count)]
        if split_of(numbers) != name:
            continue
        values = list(numbers)
        while len(values) > 1:
            right, left = (values.pop(rng.randrange(len(values))) for _ in range(2))
            symbol = rng.choice("+-*/")
            if symbol == "/" and (right == 0 or left % right):
                symbol = rng.choice("+-*")
            values.append(_JOIN[symbol](left, right))
        target = values[0]
        key = (tuple(sorted(numbers)), target)
        if 1 <= target <= level.max_target and target not in numbers and key not in seen:
            seen.add(key)
            yield {"numbers": numbers, "target": target}


def split(
    name: str,
    n: int,
    numbers: int | Sequence[int] = 4,
    *,
    level: str = "paper",
    seed: int = 0,
) -> list[Puzzle]:
    """The first `n` instances of a split: always the same, distinct, solvable.

    The target is never one of the numbers.

    Args:
        name: "train", "validation" or "test". No multiset of numbers occurs in two of them, whatever `n`,
            `level` and `seed`; a longer list begins with the shorter one.
        n: how many.
        numbers: how many numbers an instance has (2 to 6), or several such counts, which then alternate.
        level: a key of `LEVELS`: "paper" (numbers and targets up to 100) or "tiny" (1..12, targets up to 60).
        seed: another order, and for large pools other instances.

    Raises:
        ValueError: for arguments out of range, and where the pool holds fewer than `n` instances.
    """
    if name not in get_args(SplitName):
        raise ValueError(f"name must be one of {', '.join(get_args(SplitName))}, got {name!r}")
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be a non-negative integer, got {n!r}")
    if level not in LEVELS:
        raise ValueError(f"level must be one of {sorted(LEVELS)}, got {level!r}")
    counts = [numbers] if isinstance(numbers, int) else list(numbers)
    if not counts or any(not isinstance(count, int) or not 2 <= count <= 6 for count in counts):
        raise ValueError(f"numbers must be between 2 and 6, got {numbers!r}")
    if len(set(counts)) != len(counts):
        raise ValueError(f"numbers must be distinct counts, got {numbers!r}")

    ranges = LEVELS[level]
    pools: list[list[Puzzle]] = []
    for position, count in enumerate(counts):
        wanted = len(range(position, n, len(counts)))
        rng = random.Random(f"countdown/{level}/{name}/{count}/{seed}")
        if comb(ranges.max_number + count - 1, count) <= _ENUMERABLE:
            source = _enumerated(name, count, ranges, rng)
        else:
            source = _drawn(name, count, ranges, rng, _DRAWS_PER_INSTANCE * (wanted + 100))
        pool = [instance for _, instance in zip(range(wanted), source, strict=False)]
        if len(pool) < wanted:
            raise ValueError(
                f"the {name} pool of level {level!r} with {count} numbers gave {len(pool)} instances, "
                f"{wanted} were asked for"
            )
        pools.append(pool)
    return [pools[i % len(counts)][i // len(counts)] for i in range(n)]
