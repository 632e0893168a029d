"""Layouts against plain Python loops, on batches of random lengths and paddings."""

from __future__ import annotations

import random

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels import layouts

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64]
FILLS = {torch.bool: False, torch.int64: 0}  # of masks; gamma's is 1


class Drawn:
    """Some sequences, as lists of what their tokens hold, and the same as a padded batch."""

    def __init__(self, seed: int, side: str) -> None:
        draw = random.Random(seed)
        self.dtype = DTYPES[seed % len(DTYPES)]
        self.fill = FILLS.get(self.dtype, 1)
        rows = draw.choice([0, 1, 2, 5])
        self.prompts = [draw.choice([0, 1, 4]) for _ in range(rows)]
        self.responses = [draw.choice([0, 1, 2, 6]) for _ in range(rows)]
        self.totals = [p + r for p, r in zip(self.prompts, self.responses)]
        self.width = max([*self.totals, 1]) + draw.choice([0, 2])
        self.tokens = [[self.number(draw) for _ in range(total)] for total in self.totals]
        self.left = [self.width - n if side == "left" or (side == "mixed" and draw.random() < 0.5) else 0
                     for n in self.totals]  # fmt: skip
        self.padded = self.rows([[self.fill] * self.width for _ in self.tokens], self.width)
        self.live = torch.zeros(rows, self.width, dtype=torch.int64)
        for row, (first, tokens) in enumerate(zip(self.left, self.tokens)):
            self.live[row, first : first + len(tokens)] = 1
            self.padded[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=self.dtype)
        self.packed = torch.tensor([x for tokens in self.tokens for x in tokens], dtype=self.dtype)
        self.cu_seqlens = torch.tensor([sum(self.totals[:i]) for i in range(rows + 1)], dtype=torch.int32)

    def number(self, draw: random.Random):
        return draw.random() < 0.5 if self.dtype == torch.bool else draw.randint(2, 99)

    def rows(self, rows: list[list], width: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=self.dtype).reshape(len(rows), width)


def drawn(side: str = "mixed"):
    return pytest.mark.parametrize("batch", [Drawn(seed, side) for seed in range(40)], ids=range(40))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def rolled(tokens: list, fill) -> list:
    return [*tokens[1:], fill] if tokens else []


@drawn()
def test_predictions_of_padded_batches(batch):
    x, rows = batch.padded, batch.padded.tolist()
    same(layouts.shift(x), batch.rows([row[1:] for row in rows], batch.width - 1))
    same(layouts.roll(x, fill=batch.fill), batch.rows([rolled(row, batch.fill) for row in rows], batch.width))
    without_first = batch.rows([[batch.fill, *row[1:]] for row in rows], batch.width)
    same(layouts.unshift(layouts.shift(x), fill=batch.fill), without_first)
    same(layouts.unroll(layouts.roll(x, fill=batch.fill), fill=batch.fill), without_first)
    same(layouts.shift(x), layouts.roll(x, fill=batch.fill)[:, :-1])


@drawn()
def test_predictions_of_packed_batches(batch):
    """No place takes a number of another sequence, and empty sequences have no place."""
    fill, x = batch.fill, batch.packed
    there = torch.tensor([y for tokens in batch.tokens for y in rolled(tokens, fill)], dtype=batch.dtype)
    back = torch.tensor([y for tokens in batch.tokens for y in [fill, *tokens[1:]][: len(tokens)]], dtype=batch.dtype)
    same(layouts.roll(x, fill=fill, cu_seqlens=batch.cu_seqlens), there)
    same(layouts.unroll(there, fill=fill, cu_seqlens=batch.cu_seqlens), back)
    same(layouts.roll(x[None], fill=fill, cu_seqlens=batch.cu_seqlens.long()), there[None])
    same(layouts.unroll(there[None], fill=fill, cu_seqlens=batch.cu_seqlens), back[None])


@drawn("right")
def test_responses_behind_prompts_of_their_own_length(batch):
    longest = max([*batch.responses, 0])
    prompts = torch.tensor(batch.prompts, dtype=torch.int32)
    expected = []
    for tokens, prompt, response in zip(batch.tokens, batch.prompts, batch.responses):
        expected.append(tokens[prompt:] + [batch.fill] * (longest - response))
    taken = layouts.take_responses(batch.padded, prompts, longest, fill=batch.fill)
    same(taken, batch.rows(expected, longest))
    placed = []
    for tokens, prompt in zip(batch.tokens, batch.prompts):
        placed.append([batch.fill] * prompt + tokens[prompt:] + [batch.fill] * (batch.width - len(tokens)))
    same(layouts.place_responses(taken, prompts, batch.width, fill=batch.fill), batch.rows(placed, batch.width))


@drawn("left")
def test_left_padded_prompts_need_no_function(batch):
    """With one prompt length, columns of the batch, they are the last columns: what `RhythmCredit` takes."""
    for length in range(batch.width + 1):
        prompts = torch.full((len(batch.totals),), batch.width - length)
        taken = layouts.take_responses(batch.padded, prompts, length, fill=batch.fill)
        same(taken, batch.padded[:, batch.width - length :])


@drawn()
def test_packing(batch):
    same(layouts.cu_seqlens_of(batch.live), batch.cu_seqlens)
    for live in (batch.live, batch.live.bool()):
        same(layouts.pack(batch.padded, live), batch.packed)
        same(layouts.unpack(batch.packed, live, fill=batch.fill), batch.padded)
        same(layouts.unpack(batch.packed[None], live, fill=batch.fill), batch.padded)


@drawn()
def test_jagged(batch):
    nested = layouts.to_jagged(batch.packed[None], batch.cu_seqlens)
    assert nested.is_nested
    assert nested.layout == torch.jagged
    assert [row.tolist() for row in nested.unbind()] == [
        torch.tensor(tokens, dtype=batch.dtype).tolist() for tokens in batch.tokens
    ]
    values, cu_seqlens = layouts.from_jagged(nested)
    same(values, batch.packed)
    same(cu_seqlens, batch.cu_seqlens)


@drawn()
def test_lists_of_responses(batch):
    responses = layouts.split_responses(batch.packed[None], batch.totals, batch.responses)
    assert len(responses) == len(batch.tokens)
    for found, tokens, prompt in zip(responses, batch.tokens, batch.prompts):
        same(found, torch.tensor(tokens[prompt:], dtype=batch.dtype))
    joined = layouts.join_responses(responses, batch.totals, fill=batch.fill)
    filled = [[batch.fill] * p + tokens[p:] for tokens, p in zip(batch.tokens, batch.prompts)]
    expected = torch.tensor([x for row in filled for x in row], dtype=batch.dtype if filled else torch.float32)
    same(joined, expected)


def test_they_compose_from_one_trainer_to_another():
    """A rolled packed mask to the responses of a padded batch, by hand."""
    cu_seqlens = torch.tensor([0, 3, 5])
    mask = torch.tensor([False, True, False, True, False])  # tokens 2 of the first and 1 of the second are responses
    by_token = layouts.unroll(mask, fill=False, cu_seqlens=cu_seqlens)
    assert by_token.tolist() == [False, False, True, False, True]
    live = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    padded = layouts.unpack(by_token, live, fill=False)
    assert padded.tolist() == [[False, False, True, False], [False, True, False, False]]
    taken = layouts.take_responses(padded, torch.tensor([2, 1]), 1, fill=False)
    assert taken.tolist() == [[True], [True]]


def test_no_gradients_and_nothing_is_written_in_place():
    x = torch.tensor([[2.0, 3.0, 4.0]], requires_grad=True)
    cu_seqlens, live = torch.tensor([0, 2, 3]), torch.ones(1, 3)
    results = [
        layouts.shift(x),
        layouts.unshift(x, fill=1),
        layouts.roll(x, fill=1),
        layouts.unroll(x, fill=1),
        layouts.roll(x, fill=1, cu_seqlens=cu_seqlens),
        layouts.take_responses(x, torch.tensor([1]), 2, fill=1),
        layouts.pack(x, live),
        layouts.unpack(x, live, fill=1),
        layouts.to_jagged(x, cu_seqlens),
        *layouts.split_responses(x, [2, 1], [1, 1]),
        layouts.join_responses([x[0]], [4], fill=1),
    ]
    assert not any(result.requires_grad for result in results)
    assert x.tolist() == [[2.0, 3.0, 4.0]]


def test_a_gamma_goes_through_every_layout_and_back():
    """Credit is lost nowhere: outside of responses gamma is 1, as are the places without a token."""
    torch.manual_seed(0)
    live = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    prompts = torch.tensor([2, 1])
    response = (live == 1) & (torch.arange(5) >= prompts[:, None])
    gamma = torch.where(response, 1 + torch.rand(2, 5), 1.0)
    cu_seqlens, packed = layouts.cu_seqlens_of(live), layouts.pack(gamma, live)
    same(layouts.unshift(layouts.shift(gamma), fill=1), gamma)
    same(layouts.unroll(layouts.roll(gamma, fill=1), fill=1), gamma)
    same(layouts.place_responses(layouts.take_responses(gamma, prompts, 3, fill=1), prompts, 5, fill=1), gamma)
    again = layouts.unroll(layouts.roll(packed, fill=1, cu_seqlens=cu_seqlens), fill=1, cu_seqlens=cu_seqlens)
    same(layouts.unpack(again, live, fill=1), gamma)
    same(layouts.join_responses(layouts.split_responses(packed, [5, 3], [3, 2]), [5, 3], fill=1), packed)


def test_it_is_found_without_being_imported():
    assert rk.layouts is layouts


X, FLAT, CU = torch.ones(2, 3), torch.ones(5), torch.tensor([0, 2, 5])
WRONG = [
    (layouts.shift, (FLAT,), ValueError, r"x must be \(B, T\) with T >= 1, got shape \(5,\)"),
    (layouts.shift, (torch.ones(2, 0),), ValueError, r"x must be \(B, T\) with T >= 1, got shape \(2, 0\)"),
    (layouts.shift, ([1],), TypeError, "x must be a torch.Tensor, got list"),
    (layouts.unshift, (FLAT,), ValueError, r"x must be \(B, T - 1\), got shape \(5,\)"),
    (layouts.roll, (FLAT,), ValueError, r"x must be \(B, T\), or \(total,\) with cu_seqlens, got shape \(5,\)"),
    (layouts.roll, (X, CU), ValueError, r"x must be \(total,\) or \(1, total\), got shape \(2, 3\)"),
    (layouts.roll, (FLAT, X), ValueError, r"cu_seqlens must be \(S \+ 1,\), got shape \(2, 3\)"),
    (layouts.roll, (FLAT, CU.float()), TypeError, "cu_seqlens must hold integers, got torch.float32"),
    (layouts.unroll, (FLAT, CU[:2]), ValueError, "cu_seqlens must begin with 0 and end with the 5 tokens of x, got 0"),
    (layouts.unroll, (FLAT, CU[[0, 2, 1, 2]]), ValueError, r"cu_seqlens must not decrease, got \[0, 5, 2, 5\]"),
    (layouts.take_responses, (X, CU, 2), ValueError, r"prompt_lengths must be \(2,\), got shape \(3,\)"),
    (layouts.take_responses, (X, CU[:2], -1), ValueError, "length must be at least 0, got -1"),
    (layouts.take_responses, (X, -CU[:2], 1), ValueError, "prompt_lengths must be at least 0, got -2"),
    (layouts.take_responses, (X, FLAT[:2], 1), TypeError, "prompt_lengths must hold integers, got torch.float32"),
    (layouts.place_responses, (X.bool(), CU[:2], 4), ValueError, "length must hold the tokens of .*, 5, got 4"),
    (layouts.cu_seqlens_of, (FLAT,), ValueError, r"attention_mask must be \(B, T\), got shape \(5,\)"),
    (layouts.pack, (X, X[:1]), ValueError, r"attention_mask must have the shape of x, \(2, 3\), got \(1, 3\)"),
    (layouts.unpack, (FLAT, X), ValueError, "x must hold one value for each of the 6 live tokens, got 5"),
    (layouts.to_jagged, (X, CU), ValueError, r"x must be \(total,\) or \(1, total\), got shape \(2, 3\)"),
    (layouts.from_jagged, (X,), TypeError, "x must be a nested tensor of layout torch.jagged, got Tensor"),
    (layouts.from_jagged, (torch.nested.nested_tensor([FLAT]),), TypeError, "x must be a nested .* another layout"),
    (layouts.split_responses, (FLAT, [2], [1]), ValueError, "total_lengths must add up to the 5 tokens of x, got 2"),
    (layouts.split_responses, (FLAT, [5], []), ValueError, "total_lengths must have one for each of 0 .*, got 1"),
    (layouts.split_responses, (FLAT, [5], [6]), ValueError, "total_lengths must be at least .*, got 5 for 6"),
    (layouts.join_responses, ([X], [5]), ValueError, r"responses must be of one dimension each, got shape \(2, 3\)"),
]
NO_FILL = (layouts.shift, layouts.pack, layouts.cu_seqlens_of, layouts.to_jagged, layouts.from_jagged)


@pytest.mark.parametrize(("function", "arguments", "kind", "message"), WRONG)
def test_what_does_not_fit_is_named(function, arguments, kind, message):
    named = {} if function in (*NO_FILL, layouts.split_responses) else {"fill": 1}
    if function in (layouts.roll, layouts.unroll) and len(arguments) == 2:
        arguments, named["cu_seqlens"] = arguments[:1], arguments[1]
    with pytest.raises(kind, match=message):
        function(*arguments, **named)


def test_only_padding_may_stand_behind_the_batch():
    """Responses of `(B, C)` are padded, so prompt and C together may be longer than the batch; tokens may not."""
    prompts = torch.tensor([3, 1])
    mask = torch.tensor([[True, False], [True, True]])
    placed = layouts.place_responses(mask, prompts, 4, fill=False)
    assert placed.tolist() == [[False, False, False, True], [False, True, True, False]]
