"""A model's forward alone, with the probe, and the two ways of reading its attention maps that are common today."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rhythm_kernels import HeadGroups, RhythmProbe

from ..gate import WHOLE, Results
from ..shapes import ModelShape, Shape

Call = Callable[[], Results]
# Against float32 maps of the same model; in 16 bits q and k themselves differ between attention implementations.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def _model(shape: ModelShape, implementation: str, device: torch.device) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=max(shape.length, 1024),
        attn_implementation=implementation,
        dtype=shape.torch_dtype,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(shape.torch_dtype).eval()


def _groups(shape: ModelShape, seed: int) -> HeadGroups:
    """Two groups of 30% of the middle layers' heads, at random: in untrained weights no head is local or global."""
    middle = torch.linspace(shape.layers // 3, 2 * shape.layers // 3, 5).round().unique().long().tolist()
    heads = [(layer, head) for layer in middle for head in range(shape.heads)]
    order = torch.randperm(len(heads), generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, round(0.3 * len(heads)))
    return HeadGroups([heads[i] for i in order[:size]], [heads[i] for i in order[-size:]])


@dataclass(frozen=True)
class ModelProblem:
    """One model, its eager twin on the same weights, tokens, and head groups."""

    shape: ModelShape
    model: Any
    ids: Tensor
    groups: HeadGroups

    @classmethod
    def draw(cls, shape: ModelShape, device: torch.device, seed: int = 0) -> ModelProblem:
        torch.manual_seed(seed)
        model = _model(shape, "sdpa", device)
        ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=device)
        return cls(shape, model, ids, _groups(shape, seed))

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @functools.cached_property
    def eager(self) -> Any:
        twin = _model(self.shape, "eager", torch.device("meta"))
        twin.load_state_dict(self.model.state_dict(), assign=True)
        # Buffers outside of the state dictionary (rotary frequencies) are on the meta device still.
        twin.model.rotary_emb = self.model.model.rotary_emb
        return twin


def maps_memory(shape: Shape) -> int:
    """Bytes of all layers' maps, and of one layer's softmax."""
    assert isinstance(shape, ModelShape)
    size = shape.batch * shape.heads * shape.length**2
    return size * (shape.layers * shape.torch_dtype.itemsize + 8)


def layer_memory(shape: Shape) -> int:
    """Bytes of one layer's maps."""
    assert isinstance(shape, ModelShape)
    return shape.batch * shape.heads * shape.length**2 * (2 * shape.torch_dtype.itemsize + 8)


def _forward(model: Any, ids: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=1, **options)


def forward(p: ModelProblem) -> Call:
    return lambda: {"logits": _forward(p.model, p.ids).logits}


def probe(p: ModelProblem) -> Call:
    def call() -> Results:
        with RhythmProbe(p.model, p.groups, window=p.shape.window, horizon=(p.shape.lo, p.shape.hi)) as found:
            logits = _forward(p.model, p.ids).logits
        return {"logits": logits, "waad": found.waad, "fai": found.fai}

    return call


class _Sums:
    """Group maps (eq. 8) of the layers met so far, and the measures of them."""

    def __init__(self, shape: ModelShape, groups: HeadGroups) -> None:
        self.shape, self.groups = shape, groups
        self.local: Tensor | float = 0.0
        self.global_: Tensor | float = 0.0

    def add(self, layer: int, maps: Tensor) -> None:
        local, global_ = ([h for at, h in group if at == layer] for group in (self.groups.local, self.groups.global_))
        self.local = self.local + maps[:, local].sum(dim=1, dtype=torch.float32)
        self.global_ = self.global_ + maps[:, global_].sum(dim=1, dtype=torch.float32)

    def measures(self) -> Results:
        assert isinstance(self.local, Tensor) and isinstance(self.global_, Tensor)
        position = torch.arange(self.local.shape[-1], device=self.local.device)
        distance = position[:, None] - position
        rows = (distance >= self.shape.lo) & (distance <= self.shape.hi)
        waad = (self.local * distance.clamp(0, self.shape.window)).sum(dim=-1) / len(self.groups.local)
        fai = torch.where(rows, self.global_, 0.0).sum(dim=1) / rows.sum(dim=0).clamp(min=1)
        return {"waad": waad, "fai": fai / len(self.groups.global_)}


def _from_maps(shape: ModelShape, groups: HeadGroups, maps: Sequence[Tensor]) -> Results:
    sums = _Sums(shape, groups)
    for layer in sorted({layer for layer, _ in [*groups.local, *groups.global_]}):
        sums.add(layer, maps[layer])
    return sums.measures()


def eager_maps(p: ModelProblem) -> Call:
    """The paper's way: an eager forward that returns every layer's maps."""

    def call() -> Results:
        maps = _forward(p.eager, p.ids, output_attentions=True).attentions
        return _from_maps(p.shape, p.groups, maps)

    return call


def eager_hooks(p: ModelProblem) -> Call:
    """The best of today's practice: a hook reduces each layer's maps and lets them go."""

    def call() -> Results:
        sums = _Sums(p.shape, p.groups)
        wanted = {layer for layer, _ in [*p.groups.local, *p.groups.global_]}

        def hook(layer: int) -> Callable[..., Any]:
            def reduce(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
                if layer in wanted:
                    sums.add(layer, output[1])
                return (output[0], None, *output[2:])

            return reduce

        layers = p.eager.model.layers
        handles = [layer.self_attn.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
        try:
            _forward(p.eager, p.ids)
        finally:
            for handle in handles:
                handle.remove()
        return sums.measures()

    return call


class ModelGate:
    """WAAD and FAI held to `output_attentions=True` of the eager model, on the first tokens; the output bit for bit."""

    def __init__(self, problem: ModelProblem) -> None:
        self.problem = problem

    @functools.cached_property
    def _want(self) -> Results:
        p = self.problem
        maps = _forward(p.eager, p.ids[:, :WHOLE], output_attentions=True).attentions
        return _from_maps(p.shape, p.groups, maps)

    @functools.cached_property
    def _logits(self) -> Tensor:
        return _forward(self.problem.model, self.problem.ids).logits

    def error(self, got: Results) -> tuple[float, str]:
        p = self.problem
        if "logits" in got and not torch.equal(got["logits"], self._logits):
            return float("inf"), "logits changed by the probe"
        length = min(WHOLE, p.shape.length)
        whole = length == p.shape.length
        worst = 0.0, ""
        for name, keep in (("waad", length), ("fai", length if whole else length - p.shape.hi)):
            if name in got:
                error = (got[name][:, :keep] - self._want[name][:, :keep]).abs().nan_to_num(nan=float("inf")).max()
                worst = max(worst, (float(error) / _TOLERANCE[p.shape.torch_dtype], name))
        return worst
