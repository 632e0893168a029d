"""Texts that break graders: LaTeX cut and mixed at random, deep nesting, huge powers, odd characters, megabytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

GOLD = ["7", "\\frac{1}{2}", "(1,2)", "x^2+1", "\\{1,2\\}", "[0,1)", "\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}"]

_WORDS = """
\\frac \\sqrt \\boxed{ \\text{ \\left( \\right) \\sum_{n=1}^{9} \\int_0^1 \\lim_{x\\to \\binom{9}{4} \\begin{cases}
\\end{cases} \\infty \\pm \\cup \\in \\pi \\log_ \\circ \\% x y_{1} e i 10 0 -1 1e999 0x NaN and or answer: #### ½ é ∞
"""
_ODD = ["\0", "\ud800", "\udfff", "\u202e", "\U0001d7d7", "\u200b", "\u2212", "\r\n", "\t", " " * 40]
_PIECES = [*GOLD, *"{}()[]$\\^_&%#~,;=<>|!+-*/.'\"", *_WORDS.split(), *_ODD]
_POWERS = ["9^{9^{9^{9}}}", "10^{10^{10}}", "2^{2^{2^{2^{2}}}}", "99999!", "(10^9)!", "\\binom{10^9}{10^8}"]
_AROUND = [("{", "}"), ("(", ")"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("\\boxed{", "}"), ("-", "")]
_AGAIN = ["\\boxed{7} ", "{", "\\boxed{", "$", " ", "9", "1,", "x+", "\\frac", "answer: ", "\\\\", "(", "\0"]


def hostile(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Pairs of a right answer and a response, always the same."""
    draw = random.Random(seed)
    for number in range(count):
        yield draw.choice(GOLD), _KINDS[number % len(_KINDS)](draw)


def _mixed(draw: random.Random) -> str:
    return "".join(draw.choices(_PIECES, k=draw.randrange(60)))


def _boxed(draw: random.Random) -> str:
    return f"So \\boxed{{{_mixed(draw)}}}"


def _mutated(draw: random.Random) -> str:
    """A right answer with some of its characters moved, dropped or doubled."""
    text = list(draw.choice(GOLD) * draw.randrange(1, 4))
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(text) + 1)
        text[at : at + draw.randrange(2)] = draw.choice(["", draw.choice(_PIECES), *text[at : at + 2]])
    return f"\\boxed{{{''.join(text)}}}"


def _nested(draw: random.Random) -> str:
    left, right = draw.choice(_AROUND)
    depth = draw.choice([3, 30, 300, 900, 30_000])
    return f"\\boxed{{{left * depth}1{right * draw.choice([depth, depth, depth - 1, 0])}}}"


def _huge(draw: random.Random) -> str:
    power = draw.choice(_POWERS) if draw.random() < 0.04 else f"{draw.randrange(99)}^{{{draw.randrange(99)}}}"
    return f"\\boxed{{{power}{draw.choice(['', '+x', '-1', '/3', '=7', ',7'])}}}"


def _long(draw: random.Random) -> str:
    return draw.choice(_AGAIN) * draw.choice([50, 2_000, 60_000] if draw.random() < 0.9 else [300_000])


_KINDS = [_mixed, _boxed, _mutated, _boxed, _mutated, _nested, _huge, _mutated, _boxed, _long]
