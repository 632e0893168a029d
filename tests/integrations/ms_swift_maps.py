"""Gamma of a micro-batch of ms-swift's from full eager maps, each response alone: no layout of the batch is shared."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from rhythm_kernels import HeadGroups, reference

from ..probe.probe_oracle import eager_maps, oracle, spans

WINDOW, HORIZON = 4, (2, 8)  # as short as the toy's responses
LAYERS = [1, 2]  # `middle5` of four layers
GROUP = round(0.3 * 8)
Alone = list[tuple[torch.Tensor, torch.Tensor, slice]]  # of each response


def sequences(encoded: dict[str, Any], packed: bool) -> list[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Of each response of a micro-batch: its tokens alone, its mask over them, where their end stands in `(B, T)`."""
    inputs, batch = encoded["model_inputs"], encoded["grpo_batch"]
    found, ids = [], inputs["input_ids"]
    width = batch.completion_mask.shape[1]
    if packed:
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist() + [ids.shape[1]]
        rows = [ids[0, a:b] for a, b in pairwise(starts)]
        ends = [width] * len(rows)
    else:
        live = inputs["attention_mask"].bool()
        rows = [row[there] for row, there in zip(ids, live)]
        length = ids.shape[1]
        ends = [width - length + int(there.nonzero().max()) + 1 for there in live]
    for row, end, mask in zip(rows, ends, batch.completion_mask):
        share = min(len(row), end)
        inside = slice(end - share, end)
        whole = torch.zeros(len(row), dtype=torch.bool)
        whole[len(row) - share :] = mask[inside]
        assert int(whole.sum()) == int(mask.sum())
        found.append((row, whole, inside))
    return found


def cases_of(decoder: Any, alone: Alone) -> list[Any]:
    """For `probe_oracle`, the maps of each response of a micro-batch, by eager attention."""
    cases = []
    for tokens, mask, _ in alone:
        maps = eager_maps(decoder, input_ids=tokens[None], use_cache=False)
        cases.append(({layer: maps[layer] for layer in LAYERS}, [(0, 0, len(tokens))], mask[None]))
    return cases


def groups_of(cases: list[Any]) -> HeadGroups:
    found = spans(cases)
    ranked = sorted(found, key=lambda head: (found[head], head))
    return HeadGroups(ranked[:GROUP], ranked[-GROUP:])


def gamma_of(cases: list[Any], alone: Alone, groups: HeadGroups, width: int) -> torch.Tensor:
    """`(B, width)`, in the places of the micro-batch's own frame."""
    gamma = torch.ones(len(alone), width)
    for row, ((maps, bounds, mask), (_, _, inside)) in enumerate(zip(cases, alone)):
        waad, fai = oracle(maps, groups, bounds, mask, window=WINDOW, horizon=HORIZON)
        one = reference.rhythm_credit(waad.float(), fai.float(), mask)[0]
        gamma[row, inside] = one[len(one) - (inside.stop - inside.start) :]
    return gamma
