"""A model's forward alone, with the probe, and the two ways of reading its attention maps that are common today."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rhythm_kernels import HeadGroups, RhythmProbe

from ..gate import WHOLE, Results
from ..shapes import ModelShape, Shape
from . import eager_model
from .own_time import PROBE, OwnTime, Told

Call = Callable[[], Results]
# Of the largest value of a measure, against maps of an eager model of the same weights and dtype: in 16 bits q and k
# themselves differ between attention implementations, by more in each layer.
_ALLOWANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.005}


def skeleton(shape: ModelShape, implementation: str, head: bool) -> Any:
    """A model without storage: made in no time, whatever its size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=max(shape.length, 1024),
        tie_word_embeddings=False,
        attn_implementation=implementation,
        dtype=shape.torch_dtype,
    )
    with torch.device("meta"):
        return (Qwen3ForCausalLM if head else Qwen3Model)(config).to(shape.torch_dtype).eval()


def build(shape: ModelShape, implementation: str, device: torch.device, head: bool = False, seed: int = 0) -> Any:
    """A Qwen3 decoder (with `head`: its causal language model) of random weights, made where it will run.

    transformers' own initialisation would take a minute for 4B weights. Here each matrix is one call of `normal_`, of
    a scale that keeps activations near 1. The model normalises queries and keys; weights of `2**0.5` in these norms
    give logits of standard deviation 2, so that attention is neither flat nor one-hot.
    """
    model = skeleton(shape, implementation, head).to_empty(device=device)
    decoder = model.model if head else model
    with torch.device(device):  # its frequencies are no parameters, and empty now
        decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(2**0.5 if "q_norm" in name or "k_norm" in name else 1.0)
            else:
                weight.normal_(0.0, 1.0 if "embed" in name else weight.shape[1] ** -0.5, generator=generator)
    return model


def eager_twin(decoder: Any, shape: ModelShape) -> Any:
    """A decoder with eager attention on the very weights of `decoder`."""
    twin = skeleton(shape, "eager", head=False)
    twin.load_state_dict(decoder.state_dict(), assign=True)
    twin.rotary_emb = decoder.rotary_emb
    return twin


def random_groups(shape: ModelShape, seed: int) -> HeadGroups:
    """Two groups of 30% of the middle layers' heads, at random: in untrained weights no head is local or global."""
    middle = torch.linspace(shape.layers // 3, 2 * shape.layers // 3, 5).round().unique().long().tolist()
    heads = [(layer, head) for layer in middle for head in range(shape.heads)]
    order = torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, round(0.3 * len(heads)))
    return HeadGroups([heads[i] for i in order[:size]], [heads[i] for i in order[-size:]])


@dataclass(frozen=True)
class ModelProblem:
    """One decoder, its eager twin on the same weights, tokens, and head groups.

    `starts`: the first live token of each batch row; `live (B, T)` bool is the attention mask, None without padding.
    """

    shape: ModelShape
    model: Any
    ids: Tensor
    starts: list[int]
    groups: HeadGroups

    @classmethod
    def draw(cls, shape: ModelShape, device: torch.device, seed: int = 0) -> ModelProblem:
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=generator, device=device)
        # The first batch row is full, the last has half of its tokens.
        step = shape.length // (2 * max(shape.batch - 1, 1)) if shape.padded else 0
        starts = [row * step for row in range(shape.batch)]
        return cls(shape, build(shape, "sdpa", device, seed=seed), ids, starts, random_groups(shape, seed))

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @functools.cached_property
    def live(self) -> Tensor | None:
        if not self.shape.padded:
            return None
        first = torch.tensor(self.starts, device=self.device)
        return torch.arange(self.shape.length, device=self.device) >= first[:, None]

    @functools.cached_property
    def eager(self) -> Any:
        return eager_twin(self.model, self.shape)

    def run(self) -> Tensor:
        """The forward that is timed: the last hidden states, `(B, T, E)`."""
        with torch.set_grad_enabled(self.shape.gradients):
            return self.model(self.ids, attention_mask=self.live, use_cache=False).last_hidden_state.detach()


def forward(p: ModelProblem) -> Call:
    return lambda: {"hidden": p.run()}


def probe(p: ModelProblem) -> Call:
    """The forward with the probe; it tells what the probe itself took of it."""

    def run(own: OwnTime) -> Results:
        horizon = (p.shape.lo, p.shape.hi)
        with (
            own.around(*PROBE),
            RhythmProbe(p.model, p.groups, window=p.shape.window, horizon=horizon) as found,
        ):
            hidden = p.run()
        with own.bracket():
            return {"hidden": hidden, "waad": found.waad, "fai": found.fai}

    return Told(p.device, run)


def eager_maps(p: ModelProblem) -> Call:
    return lambda: eager_model.with_maps(p.eager, p.shape, p.groups, p.ids, p.live, p.live)


def eager_hooks(p: ModelProblem) -> Call:
    return lambda: eager_model.with_hooks(p.eager, p.shape, p.groups, p.ids, p.live, p.live)


def maps_memory(shape: Shape, device: str) -> int:
    assert isinstance(shape, ModelShape)
    return eager_model.maps_memory(shape, device)


def layer_memory(shape: Shape, device: str) -> int:
    assert isinstance(shape, ModelShape)
    return eager_model.layer_memory(shape, device)


class ModelGate:
    """WAAD and FAI held to the maps of the eager model, on the first tokens of each row; the output bit for bit."""

    def __init__(self, problem: ModelProblem) -> None:
        self.problem = problem
        self._hidden: Tensor | None = None

    @functools.cached_property
    def _want(self) -> list[Results]:
        """Of each row's first `WHOLE` tokens without their padding: by causality they are those of the whole row."""
        p = self.problem
        rows = [p.ids[row : row + 1, start : start + WHOLE] for row, start in enumerate(p.starts)]
        shape = replace(p.shape, batch=1)
        return [eager_model.with_maps(p.eager, shape, p.groups, ids, None, None) for ids in rows]

    def _output_changed(self, hidden: Tensor, measured: bool) -> bool:
        """What padding is given as output means nothing, and may be NaN."""
        if self._hidden is None:  # the first forward alone is the one to be compared with
            self._hidden = self.problem.run() if measured else hidden
        if hidden.shape != self._hidden.shape:
            return True
        return not all(
            torch.equal(found[start:], want[start:]) and bool(found[start:].isfinite().all())
            for found, want, start in zip(hidden, self._hidden, self.problem.starts)
        )

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance (above 1: the gate is red), and where it was found."""
        p = self.problem
        if "hidden" in got and self._output_changed(got["hidden"], "waad" in got):
            return float("inf"), "hidden states changed by the probe"
        worst = 0.0, ""
        for name in ("waad", "fai"):
            if name not in got:
                continue
            if got[name].shape != p.ids.shape or not bool(got[name].isfinite().all()):
                return float("inf"), f"{name} has shape {tuple(got[name].shape)}, or is not finite"
            allowed = _ALLOWANCE[p.shape.torch_dtype] * max(float(want[name].max()) for want in self._want)
            for found, want, start in zip(got[name], self._want, p.starts):
                keep = want[name].shape[1]
                if name == "fai" and start + keep < p.shape.length:  # later rows look at the last of these tokens
                    keep -= p.shape.hi
                error = (found[start : start + keep] - want[name][0, :keep]).abs().max()
                padding = found[:start].abs().max() if start else 0.0
                worst = max(worst, (max(float(error), float(padding)) / allowed, name))
        return worst
