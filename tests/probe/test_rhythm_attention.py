"""attn_implementation="rhythm": outputs and gradients are those of the model's other implementations, in every use."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe, functional, head_groups
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe import calibration, rhythm_attention
from rhythm_kernels.probe.range_mask import RangeMask, rhythm_mask

from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

ROOT = Path(__file__).resolve().parents[2]
GROUPS = HeadGroups(local=[(0, 0), (2, 1), (2, 3)], global_=[(1, 0), (2, 2), (3, 3)])
register()


def both(family, other, **overrides):
    """The same weights under "rhythm" and under another implementation."""
    mine, theirs = (models.tiny_model(family, name, **overrides) for name in ("rhythm", other))
    assert mine.config._attn_implementation == "rhythm"
    return mine, theirs


def gradients(model, batch, **options):
    model.zero_grad()
    logits = model(**batch, use_cache=False, **options).logits
    live = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    (logits.float().log_softmax(-1)[..., 3] * live).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(mine, theirs, tolerance=1e-4):
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        error = (mine[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert error < tolerance, (name, float(error))


@pytest.fixture
def counted(monkeypatch):
    """How many attention calls our own op computed."""
    calls = []
    monkeypatch.setattr(
        rhythm_attention,
        "attention_with_rhythm",
        lambda *args, **kwargs: (calls.append(1), functional.attention_with_rhythm(*args, **kwargs))[1],
    )
    return calls


@pytest.mark.parametrize("layout", ["unpadded", "padded", "packed"])
@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("llama", "sdpa"),
        ("qwen3", "sdpa"),
        ("mistral", "sdpa"),
        ("olmo3", "sdpa"),
        ("deepseek_v3", "sdpa"),
        ("gemma2", "eager"),
        ("gpt_oss", "eager"),
    ],
)
def test_gradients(family, other, layout, counted):
    """Sinks included: `gpt_oss` has them as parameters."""
    mine, theirs = both(family, other)
    batch = {"input_ids": models.tokens(2, 70)}
    if layout == "padded":
        batch = models.padded_batch()
    if layout == "packed":
        batch, _ = models.packed_batch()
    want = gradients(theirs.train(), batch)
    assert_close_gradients(gradients(mine.train(), batch), want)
    assert len(counted) == 4
    if family == "gpt_oss":
        assert all(grad.abs().max() > 0 for name, grad in want.items() if "sinks" in name)


def test_gradients_are_identical_with_a_probe(counted):
    model = models.tiny_model("qwen3", "rhythm").train()
    batch = models.padded_batch()
    plain = gradients(model, batch)
    with RhythmProbe(model, GROUPS):
        probed = gradients(model, batch)
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, counted):
    model = models.tiny_model("gpt_oss", "rhythm").train()
    batch = models.padded_batch()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with RhythmProbe(model, GROUPS) as probe:
        again = gradients(model, batch)
    assert len(counted) == 12  # plain, forward, recomputation
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    maps = eager_maps(model.eval(), **batch)
    waad, _ = oracle(maps, GROUPS, padded_bounds(batch["attention_mask"]))
    torch.testing.assert_close(probe.waad.double(), waad, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generate(family, options):
    """Prompts go through our op, steps with a cache through transformers' own functions; the tokens are the same."""
    mine, theirs = both(family, "eager")
    batch = models.padded_batch(40)
    batch = {name: x[[0, 1]] for name, x in batch.items()}  # left padding
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options}
    assert torch.equal(mine.generate(**batch, **options), theirs.generate(**batch, **options))
    assert torch.equal(mine.generate(batch["input_ids"], **options), theirs.generate(batch["input_ids"], **options))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_prompt_in_two_parts(family, counted):
    """Queries after a cache: fewer than keys, which is not ours to compute."""
    mine, theirs = both(family, "eager")
    ids = models.tokens(2, 50)
    with torch.no_grad():
        first = mine(ids[:, :30], use_cache=True)
        second = mine(ids[:, 30:], past_key_values=first.past_key_values).logits
        whole = theirs(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second], dim=1), whole, atol=1e-3, rtol=0)
    assert len(counted) == 4


def test_dropout_is_left_to_sdpa(counted):
    mine, theirs = both("llama", "sdpa", attention_dropout=0.3)
    batch = {"input_ids": models.tokens(2, 40)}
    torch.manual_seed(4)
    got = gradients(mine.train(), batch)
    torch.manual_seed(4)
    assert_close_gradients(got, gradients(theirs.train(), batch))
    assert counted == []


@pytest.mark.parametrize("kind", ["holes", "custom", "bidirectional"])
def test_masks_of_other_shapes_are_left_to_sdpa(kind, counted):
    mine, theirs = both("llama", "sdpa")
    ids = models.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 7] = 0
    options = {"attention_mask": mask}
    if kind == "custom":
        options = {"attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool).tril().triu(-5)}
    if kind == "bidirectional":
        options = {"is_causal": False}
    with torch.no_grad():
        torch.testing.assert_close(mine(ids, **options).logits, theirs(ids, **options).logits)
    assert counted == []


def test_chunked_attention(counted):
    """Llama 4 attends within chunks, which are ranges."""
    overrides = {
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "num_local_experts": 2,
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "pad_token_id": 0,
    }
    mine, theirs = both("llama4_text", "sdpa", **overrides)
    batch = models.padded_batch(50)
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(mine(**batch).logits[live], theirs(**batch).logits[live], atol=1e-4, rtol=0)
        assert len(counted) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    mine, theirs = both("qwen3", "sdpa")
    batch = models.padded_batch()
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        got, want = (model.to(dtype)(**batch).logits[live].double() for model in (mine, theirs))
    # Both round: the error of one against the other is held to that of the rounding itself.
    exact = theirs.double()(**batch).logits[live].detach()
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + 1e-9


def test_autocast(counted):
    mine, theirs = both("qwen3", "sdpa")
    batch = models.padded_batch()
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = theirs(**batch).logits[live]
        with torch.autocast("cpu", torch.bfloat16):
            got, want = (model(**batch).logits[live].float() for model in (mine, theirs))
            with RhythmProbe(mine, GROUPS) as probe:
                mine(**batch)
    assert len(counted) == 8
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
    assert set(probe.lse_source.values()) == {"rhythm attention"}


def test_several_packed_rows(counted):
    model = models.tiny_model("mistral", "rhythm")
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((20, 44), (33, 31), (64,))])
    bounds = [(0, 0, 20), (0, 20, 64), (1, 0, 33), (1, 33, 64), (2, 0, 64)]
    batch = {"input_ids": models.tokens(3, 64), "position_ids": positions}
    maps = eager_maps(model, **batch, use_cache=False)
    response = torch.zeros(3, 64, dtype=torch.bool)
    response[:, 10:60] = True
    with torch.no_grad(), RhythmProbe(model, GROUPS, response_mask=response) as probe:
        model(**batch, use_cache=False)
    assert set(probe.lse_source.values()) == {"rhythm attention"}
    for got, want in zip((probe.waad, probe.fai), oracle(maps, GROUPS, bounds, response)):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": models.tokens(3, 1)},
        {"input_ids": models.tokens(2, 9), "attention_mask": torch.tensor([[0] * 9, [1] * 9])},
        {"input_ids": models.tokens(2, 9), "attention_mask": torch.zeros(2, 9, dtype=torch.long)},
        {"input_ids": models.tokens(2, 9), "attention_mask": torch.ones(2, 9)},
        {"inputs_embeds": torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))},
    ],
    ids=["one token", "a row of padding", "all padding", "float mask", "embeddings"],
)
@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 1}, {"head_dim": 264}], ids=str)
def test_odd_inputs(batch, overrides):
    mine, theirs = both("mistral", "sdpa", **overrides)
    live = batch.get("attention_mask", torch.ones(9 if "inputs_embeds" in batch else 1)).bool()
    with torch.no_grad():
        got, want = (model(**batch).logits for model in (mine, theirs))
    assert got.isfinite().all()
    torch.testing.assert_close(got[live.expand(got.shape[:2])], want[live.expand(got.shape[:2])], atol=1e-4, rtol=0)


def test_trl_trains_and_generates_with_it(tmp_path):
    pytest.importorskip("trl")
    from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
    from tests.integrations import toy

    trainers = [
        toy.train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path / name, model=toy.build_model(name))
        for name in ("rhythm", "sdpa")
    ]
    mine, theirs = map(toy.losses, trainers)
    assert mine == pytest.approx(theirs, abs=1e-4)
    torch.testing.assert_close(*map(toy.weights, trainers), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["unpadded", "padded", "packed"])
@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_calibration_in_the_same_pass(family, layout, monkeypatch):
    """Where attention gives the span as it is computed, calibration takes it from there; a probe never asks for it."""
    if family == "gpt_oss" and layout == "packed":
        family = "gemma2"  # gpt-oss ignores packed positions
    model = models.tiny_model(family, "rhythm")
    batch, response = {"input_ids": models.tokens(2, 70)}, torch.ones(2, 70, dtype=torch.bool)
    if layout == "padded":
        batch = models.padded_batch()
        response = batch["attention_mask"].bool()
    if layout == "packed":
        batch, _ = models.packed_batch()
        response = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    response[:, :25] = False
    response[:, 60:] = False
    batches = [{**batch, "response_mask": response}]
    apart = head_groups(model, batches, layers="all")
    requests = []
    ask = rhythm_attention.asking
    monkeypatch.setattr(rhythm_attention, "asking", lambda request: (requests.append(request), ask(request))[1])
    monkeypatch.setattr(rhythm_attention, "is_one_pass", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "span", None)  # nobody takes another pass
        together = head_groups(model, batches, layers="all")
    assert together == apart
    for which in ("local", "global"):
        assert together.provenance["span"][which] == pytest.approx(apart.provenance["span"][which], rel=1e-4)
    assert [request.heads for request in requests] == [[0, 1, 2, 3]] * 4
    requests.clear()
    with torch.no_grad(), RhythmProbe(model, GROUPS):
        model(**batch, use_cache=False)
    assert requests == [None] * 4


@pytest.mark.parametrize("family", [pytest.param("mistral", marks=pytest.mark.long), "gpt_oss"])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_on_triton(family, monkeypatch):
    """The kernels of a GPU, interpreted where there is none: outputs, gradients, measures, calibration in one pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine, theirs = both(family, "eager", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    mine, theirs = mine.to(device), theirs.to(device)
    batch = {"input_ids": models.tokens(2, 24).to(device), "attention_mask": torch.ones(2, 24, device=device).long()}
    batch["attention_mask"][0, :5] = 0
    groups = HeadGroups(local=[(0, 0), (0, 1), (1, 3)], global_=[(1, 0)])
    on_triton = functools.partial(functional.attention_with_rhythm, backend="triton")
    monkeypatch.setattr(rhythm_attention, "attention_with_rhythm", on_triton)
    monkeypatch.setattr(rhythm_attention, "is_one_pass", lambda device: True)
    with torch.no_grad():
        plain = mine(**batch, use_cache=False).logits
        with RhythmProbe(mine, groups) as probe:
            assert torch.equal(mine(**batch, use_cache=False).logits, plain)
    maps = {layer: one.cpu() for layer, one in eager_maps(theirs, **batch).items()}
    waad, fai = oracle(maps, groups, padded_bounds(batch["attention_mask"].cpu()))
    torch.testing.assert_close(probe.waad.cpu().double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.cpu().double(), fai, atol=1e-4, rtol=0)
    assert head_groups(mine, [batch], layers="all") == head_groups(theirs, [batch], layers="all")
    assert_close_gradients(gradients(mine.train(), batch), gradients(theirs.train(), batch))


def test_calibration_agrees_with_eager():
    mine, theirs = both("gpt_oss", "eager")
    batch = models.padded_batch()
    assert head_groups(mine, [batch], layers="all") == head_groups(theirs, [batch], layers="all")


@pytest.mark.parametrize(
    ("layout", "probed"),
    [
        ("padded", False),
        ("packed", True),
        pytest.param("unpadded", False, marks=pytest.mark.long),
        pytest.param("unpadded", True, marks=pytest.mark.long),
        pytest.param("padded", True, marks=pytest.mark.long),
        pytest.param("packed", False, marks=pytest.mark.long),
    ],
)
def test_compiled(layout, probed):
    torch._dynamo.reset()
    model = models.tiny_model("mistral", "rhythm", num_hidden_layers=2)
    batch = {"input_ids": models.tokens(2, 40)}
    if layout == "padded":
        batch = models.padded_batch()
    if layout == "packed":
        batch, _ = models.packed_batch()
    groups = HeadGroups(local=[(0, 0)], global_=[(1, 0)])
    want = gradients(model, batch)
    with RhythmProbe(model, groups) as expected:
        gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    if not probed:
        got = gradients(compiled, batch)
    else:
        with RhythmProbe(compiled, groups) as probe:
            got = gradients(compiled, batch)
        torch.testing.assert_close(probe.waad, expected.waad)
        torch.testing.assert_close(probe.fai, expected.fai)
    assert_close_gradients({name.removeprefix("_orig_mod."): grad for name, grad in got.items()}, want)


def test_sparse_attention_is_refused():
    module = models.tiny_model("llama", "rhythm").model.layers[0].self_attn
    q = torch.zeros(1, 4, 8, 16)
    with pytest.raises(NotImplementedError, match="sparse attention"):
        rhythm_attention.rhythm_attention(module, q, q[:, :2], q[:, :2], None, indices=torch.zeros(1, 8, 2))
    mask = rhythm_mask(2, 8, 8, attention_mask=torch.tensor([[True] * 8, [False] * 3 + [True] * 5]))
    assert isinstance(mask, RangeMask)
    for use in (lambda: mask[:, 0], lambda: q[0, 0] + mask, lambda: mask & mask):
        with pytest.raises(NotImplementedError, match="computes with its attention mask"):
            use()
    with pytest.raises(AttributeError, match="dtype: this model computes with its attention mask"):
        mask.dtype  # noqa: B018


def test_cu_seq_lens_alone_are_refused():
    """sdpa lets the sequences see each other without a word."""
    model = models.tiny_model("llama", "rhythm")
    batch, bounds = models.packed_batch()
    ends = torch.tensor([0, *(end for _, _, end in bounds)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    with torch.no_grad():
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            model(batch["input_ids"], **lengths, use_cache=False)
        want = model(**batch, use_cache=False).logits
        assert torch.equal(model(**batch, **lengths, use_cache=False).logits, want)


def test_masks_equal_those_of_sdpa():
    """Every mask that transformers composes: causal, sliding, packed, chunked, padded on either side."""
    from transformers import masking_utils as utils

    padding = models.padded_batch(30)["attention_mask"].bool()
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in row]) for row in ((9, 21), (30,), (1, 2, 27), (15, 15))]
    )
    packed = utils.find_packed_sequence_indices(positions)
    left_padding = torch.tensor([4, 0, 2, 7])
    for window in (1, 2, 7, 29, 30, 99):
        for function in (
            utils.causal_mask_function,
            utils.sliding_window_causal_mask_function(window),
            utils.chunked_causal_mask_function(window, left_padding),
        ):
            together = utils.and_masks(function, utils.packed_sequence_mask_function(packed))
            for mask_function, attention_mask in ((function, None), (function, padding), (together, None)):
                arguments = {"mask_function": mask_function, "attention_mask": attention_mask}
                arguments["allow_is_causal_skip"] = False
                mine = rhythm_mask(4, 30, 30, **arguments)
                assert isinstance(mine, RangeMask)
                want = utils.sdpa_mask(4, 30, 30, **arguments)
                live = padding[:, None, :, None] if attention_mask is not None else torch.tensor(True)
                assert torch.equal(mine.dense() & live, want & live)


def test_registration():
    """Unknown before anything of ours is made; the first probe of a process registers it."""
    code = """
        from tests.probe import probe_models as models
        import rhythm_kernels as rk
        model = models.tiny_model("llama")
        try:
            model.set_attn_implementation("rhythm")
        except ValueError:
            pass
        else:
            raise AssertionError
        rk.RhythmProbe(model, rk.HeadGroups([(0, 0)], [(0, 0)]))
        model.set_attn_implementation("rhythm")
        assert model(models.tokens(1, 9)).logits.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True, capture_output=True)
