"""Which rows count: response masks, horizons, packing with responses, lengths that change from call to call."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from rhythm_kernels import HeadGroups, RhythmProbe
from rhythm_kernels.integrations.transformers import register

from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

GROUPS = HeadGroups(local=[(0, 0), (2, 1), (2, 3)], global_=[(1, 0), (2, 2), (3, 3)])


def holed_responses(mask: torch.Tensor) -> torch.Tensor:
    """Responses that start inside each row, with a hole, ending before the row's live tokens do; the last has none."""
    response = torch.zeros_like(mask, dtype=torch.bool)
    for row, live in enumerate(mask.bool()):
        start, end = int(live.nonzero()[0]), int(live.nonzero()[-1]) + 1
        response[row, start + 6 : end - 3] = True
        response[row, start + 12 : start + 17] = False
    response[-1] = False
    return response


def measured(model, groups, batch, response=None, **options):
    with torch.no_grad(), RhythmProbe(model, groups, response_mask=response, **options) as probe:
        model(**batch, use_cache=False)
    return probe


def check(probe, expected, tolerance=1e-4):
    torch.testing.assert_close(probe.waad.double(), expected[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(probe.fai.double(), expected[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("window", "horizon"), [(10, (10, 50)), (1, (0, 0)), (25, (4, None))])
def test_response_mask(implementation, window, horizon):
    model = models.tiny_model("qwen3", implementation)
    batch = models.padded_batch()
    mask = batch["attention_mask"]
    response = holed_responses(mask)
    probe = measured(model, GROUPS, batch, response, window=window, horizon=horizon)
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(mask), response, window, horizon))
    assert not probe.waad[-1].any()
    assert not probe.fai[-1].any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("horizon", [(10, 50), (0, None)])
def test_packed_responses(implementation, horizon):
    model = models.tiny_model("qwen3", implementation)
    batch, bounds = models.packed_batch()
    response = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for _, start, end in bounds[:-1]:
        response[0, start + 4 : end - 2] = True
    response[0, bounds[1][1] + 9] = False  # a hole; the last sequence has no response
    probe = measured(model, GROUPS, batch, response, horizon=horizon)
    check(probe, oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds, response, horizon=horizon))


def test_several_packed_rows():
    model = models.tiny_model("llama")
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((20, 44), (33, 31), (64,))])
    bounds = [(0, 0, 20), (0, 20, 64), (1, 0, 33), (1, 33, 64), (2, 0, 64)]
    batch = {"input_ids": models.tokens(3, 64), "position_ids": positions}
    maps = eager_maps(model, **batch, use_cache=False)
    check(measured(model, GROUPS, batch), oracle(maps, GROUPS, bounds))
    response = torch.zeros(3, 64, dtype=torch.bool)
    response[:, 10:60] = True
    check(measured(model, GROUPS, batch, response), oracle(maps, GROUPS, bounds, response))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "rhythm"])
def test_padding_free_collator(implementation):
    """transformers' own collator packs rows and names their positions."""
    register()
    model = models.tiny_model("qwen3", implementation)
    rows = [models.tokens(1, length, seed=length)[0].tolist() for length in (23, 41, 8)]
    packed = DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in rows])
    labels = packed.pop("labels")  # -100 at the first token of each sequence
    probe = measured(model, GROUPS, packed, labels != -100)
    start = 0
    for row in rows:
        end = start + len(row)
        alone = torch.tensor([row])
        response = torch.ones_like(alone, dtype=torch.bool)
        response[:, 0] = False
        single = measured(model, GROUPS, {"input_ids": alone}, response)
        torch.testing.assert_close(probe.waad[:, start:end], single.waad, atol=1e-4, rtol=0)
        torch.testing.assert_close(probe.fai[:, start:end], single.fai, atol=1e-4, rtol=0)
        start = end


def test_lengths_and_masks_change_between_forwards():
    model = models.tiny_model("llama")
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        for length in (40, 1, 61):
            ids = models.tokens(2, length, seed=length)
            response = torch.zeros(2, length, dtype=torch.long)
            response[:, length // 2 :] = 1
            probe.response_mask = response
            model(ids)
            expected = oracle(eager_maps_outside(ids), GROUPS, padded_bounds(torch.ones_like(ids)), response)
            check(probe, expected)
            assert probe.waad.shape == ids.shape
            assert probe.waad.dtype == probe.fai.dtype == torch.float32


def eager_maps_outside(ids):
    """Maps of a twin model, so that the probed one's registry is not switched while it is watched."""
    return eager_maps(models.tiny_model("llama", "eager"), input_ids=ids)


def test_all_true_mask_is_no_mask():
    model = models.tiny_model("llama")
    ids = models.tokens(2, 50)
    with_mask = measured(model, GROUPS, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    without = measured(model, GROUPS, {"input_ids": ids})
    assert torch.equal(with_mask.waad, without.waad)
    assert torch.equal(with_mask.fai, without.fai)


def test_a_row_without_live_tokens():
    model = models.tiny_model("llama", "eager")
    batch = models.padded_batch()
    batch["attention_mask"][1] = 0
    probe = measured(model, GROUPS, batch)
    assert not probe.waad[1].any()
    assert torch.isfinite(probe.waad).all()
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(batch["attention_mask"])))


def test_positional_arguments_and_embeddings():
    model = models.tiny_model("llama")
    batch = models.padded_batch()
    by_name = measured(model, GROUPS, batch)
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(probe.waad, by_name.waad)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    assert torch.equal(probe.fai, by_name.fai)
