"""Chunked attention (Llama 4): every token's own chunk alone is seen, wherever padding and packing put its edges."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers.models.llama4 import modeling_llama4

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups, passes
from rhythm_kernels.canonical import canonical
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe import rhythm_attention
from rhythm_kernels.probe.calibration import Calibration, evaluating
from rhythm_kernels.probe.checks import Checks
from rhythm_kernels.probe.chunks import in_chunks
from rhythm_kernels.probe.forward_sequences import ForwardInputs, sequences_of
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from . import probe_models as models
from .probe_oracle import eager_maps, kurtoses, oracle, padded_bounds, spans

register()
CHUNK = 16
KINDS = ["chunked_attention", "full_attention", "chunked_attention", "chunked_attention"]
GROUPS = HeadGroups(local=[(0, 0), (1, 1), (3, 2)], global_=[(0, 3), (1, 0), (2, 2)])
IMPLEMENTATIONS = ["eager", "sdpa", "rhythm"]


def llama4(implementation="sdpa", chunk=CHUNK):
    return models.tiny_model(
        "llama4_text",
        implementation,
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=chunk,
        layer_types=KINDS,
    )


def measured(model, batch, response=None, groups=GROUPS, **options):
    with torch.no_grad(), RhythmProbe(model, groups, response_mask=response, **options) as probe:
        model(**batch, use_cache=False)
    return probe


def check(probe, expected, tolerance=1e-4):
    torch.testing.assert_close(probe.waad.double(), expected[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(probe.fai.double(), expected[1], atol=tolerance, rtol=0)
    assert probe.fai.any()


def responses(mask: torch.Tensor) -> torch.Tensor:
    """Begin within a chunk and reach over edges of chunks; the last row has none."""
    response = torch.zeros_like(mask, dtype=torch.bool)
    for row, live in enumerate(mask.bool()):
        start, end = int(live.nonzero()[0]), int(live.nonzero()[-1]) + 1
        response[row, start + 6 : end - 3] = True
    response[-1] = False
    return response


@pytest.mark.parametrize("horizon", [(0, 0), (3, 9), (10, 50), (0, None), (20, None)])
@pytest.mark.parametrize("responding", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padded(implementation, responding, horizon):
    model = llama4(implementation)
    batch = models.padded_batch()
    mask = batch["attention_mask"]
    response = responses(mask) if responding else None
    probe = measured(model, batch, response, horizon=horizon)
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(mask), response, horizon=horizon))


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_shorter_and_longer_than_a_chunk(implementation, length):
    model = llama4(implementation)
    batch = {"input_ids": models.tokens(2, length)}
    maps = eager_maps(model, **batch, use_cache=False)
    bounds = padded_bounds(torch.ones(2, length))
    check(measured(model, batch, horizon=(2, 30)), oracle(maps, GROUPS, bounds, horizon=(2, 30)))


@pytest.mark.parametrize("horizon", [(3, 9), (0, None)])
@pytest.mark.parametrize("responding", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed(implementation, responding, horizon):
    model = llama4(implementation)
    batch, bounds = models.packed_batch((21, 40, 1, 5, 33))
    response = None
    if responding:
        response = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for _, start, end in bounds[:2] + bounds[4:]:
            response[0, start + 4 : end - 2] = True
    maps = eager_maps(model, **batch, use_cache=False)
    probe = measured(model, batch, response, horizon=horizon)
    check(probe, oracle(maps, GROUPS, bounds, response, horizon=horizon))


def test_several_packed_rows():
    model = llama4()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((20, 44), (33, 31), (64,))])
    bounds = [(0, 0, 20), (0, 20, 64), (1, 0, 33), (1, 33, 64), (2, 0, 64)]
    batch = {"input_ids": models.tokens(3, 64), "position_ids": positions}
    check(measured(model, batch), oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds))


@pytest.mark.parametrize("implementation", ["sdpa", "rhythm", "rhythm in one pass"])
def test_calibration(implementation, monkeypatch):
    if implementation.endswith("one pass"):  # as where Triton runs: the attention call gives the spans
        monkeypatch.setattr(rhythm_attention, "is_one_pass", lambda device: True)
    model = llama4(implementation.split()[0])
    batch = models.padded_batch()
    mask = batch["attention_mask"]
    response = responses(mask)
    groups = head_groups(model, [{**batch, "response_mask": response}], layers="all")
    assert groups.provenance["layers"] == [0, 1, 2, 3]
    expected = spans([(eager_maps(model, **batch), padded_bounds(mask), response)])
    for heads, found in ((groups.local, "local"), (groups.global_, "global")):
        for head, span in zip(heads, groups.provenance["span"][found]):
            assert span == pytest.approx(expected[head], abs=1e-4)


@pytest.mark.parametrize("responding", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_of_every_head(implementation, packed, responding):
    """Span, and kurtosis of what each token of R receives from all of R at least four tokens later, chunks or not."""
    model = llama4(implementation)
    if packed:
        batch, bounds = models.packed_batch((21, 40, 1, 5, 33))
        live = torch.ones_like(batch["input_ids"])
    else:
        batch = models.padded_batch()
        live = batch["attention_mask"]
        bounds = padded_bounds(live)
    response = None
    if responding:  # R begins within the second chunk of its sequence, or within the first
        response = torch.zeros_like(live, dtype=torch.bool)
        for row, start, end in bounds:
            response[row, start + (20 if end - start > 30 else 4) : end - 3] = True
    calibration = Calibration(model, "all", by="receiver")
    with evaluating(model), calibration:
        calibration.response_mask = response
        model(**batch, use_cache=False)
    maps = eager_maps(model, **batch, use_cache=False)
    span, kurtosis = calibration.scores()
    assert span == pytest.approx(spans([(maps, bounds, response)]), rel=1e-5)
    assert kurtosis == pytest.approx(kurtoses(maps, bounds, response), rel=1e-4)


def test_layers_in_chunks_are_sampled():
    decoder = find_decoder(llama4())
    assert attention_layers(decoder, "middle5") == [1, 2]
    assert attention_layers(decoder, "all") == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [CHUNK, 2 * CHUNK])
def test_a_mask_without_chunks(length, monkeypatch):
    """The layer says that it attends in chunks; where its mask does not, neither is believed."""
    monkeypatch.setattr(modeling_llama4, "create_chunked_causal_mask", modeling_llama4.create_causal_mask)
    batch = {"input_ids": models.tokens(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    batch["attention_mask"][0, :3] = 0
    refused = pytest.raises(ValueError, match="not plain causal attention in chunks of 16")
    with refused if length > CHUNK else contextlib.nullcontext():
        measured(llama4(), batch)


def test_no_mask_where_there_must_be_chunks(monkeypatch):
    monkeypatch.setattr(modeling_llama4, "create_chunked_causal_mask", lambda **_: None)
    with pytest.raises(ValueError, match="the layer attends in chunks, but 'sdpa' attention was given no mask"):
        measured(llama4(), {"input_ids": models.tokens(2, 40)})


def test_rows_that_outgrow_a_chunk_in_the_middle_of_a_run():
    model = llama4()
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        for length in (12, 30, 9, 50):
            ids = models.tokens(2, length, seed=length)
            model(ids, use_cache=False)
            maps = eager_maps(llama4("eager"), input_ids=ids)
            torch.testing.assert_close(
                probe.waad.double(), oracle(maps, GROUPS, padded_bounds(torch.ones_like(ids)))[0], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_every_backend_reads_several_entries_of_one_row(backend):
    """The table of a padded batch in chunks, straight through the passes, against dense float64 maps."""
    batch, length, chunk = 3, 37, 8
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, heads, 16, generator=generator) for heads in (4, 2))
    live = torch.ones(batch, length, dtype=torch.bool)
    live[0, :5] = live[1, 30:] = False
    response = torch.zeros_like(live)
    response[:, 11:33] = True
    inputs = ForwardInputs(batch, length, q.device, attention_mask=live)
    sequences = in_chunks(sequences_of(inputs, response, False, Checks()), chunk)
    options = dict.fromkeys(["cu_seqlens", "max_seqlen", "seq_start", "seq_end", "response_start", "sinks"])
    rule = {"softmax_scale": 0.4, "window_size": (-1, 0), "softcap": 0.0}
    form = canonical(q, k, None, heads=[1, 2], table=sequences.table, **options, **rule)
    form = form._replace(lse=None)

    start = torch.tensor([5, 0, 0])[:, None]
    token = torch.arange(length)
    piece = (token - start) // chunk
    seen = (piece[:, :, None] == piece[:, None, :]) & (token[:, None] >= token) & live[:, :, None] & live[:, None, :]
    logits = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.4
    maps = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)[:, [1, 2]].mean(1)
    distance = (token[:, None] - token).clamp(0, 3)
    rows = response & live
    torch.testing.assert_close(
        passes.waad(form, 3, backend=backend).double(), (maps * distance).sum(-1) * rows, atol=1e-5, rtol=0
    )
    expected = torch.zeros(batch, length, dtype=torch.float64)
    for row in range(batch):
        end = int(rows[row].nonzero()[-1]) + 1
        for s in rows[row].nonzero().flatten().tolist():
            stop = min(s + 6, end, int(start[row]) + (int(piece[row, s]) + 1) * chunk)  # of T(s) within the chunk
            if stop > s + 1:
                expected[row, s] = maps[row, s + 1 : stop, s].mean()
    torch.testing.assert_close(passes.fai(form, (1, 5), backend=backend).double(), expected, atol=1e-5, rtol=0)
