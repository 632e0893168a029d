"""A page's code, run as it stands there, beside stand-ins of the package that it is for; and gamma of full maps."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from rhythm_kernels import RhythmSettings, reference
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from ...probe.probe_oracle import eager_maps, oracle, padded_bounds, spans

PAGES = Path(__file__).resolve().parents[3] / "docs" / "trainers"


def page_code(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def install(monkeypatch, modules: dict[str, dict]) -> None:
    """Stand-ins into `sys.modules`, and every package that they are in; each is an attribute of its parent."""
    for name in sorted({".".join(full.split(".")[: i + 1]) for full in modules for i in range(full.count(".") + 1)}):
        module = types.ModuleType(name)
        module.__dict__.update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)


def run_page(monkeypatch, name: str, code: str) -> types.ModuleType:
    """A block of a page as the module that the page tells to save it as."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, f"<{name}, of its page>", "exec"), module.__dict__)
    return module


def gamma_from_maps(model, tokens: Tensor, live: Tensor, mask: Tensor, groups, settings: RhythmSettings) -> Tensor:
    """Gamma `(B, T)` of padded tokens by the formulas, on maps that the eager implementation keeps in full.

    Args:
        live: `(B, T)` bool, not padding.
        mask: `(B, T)` bool, the tokens that get credit.
    """
    maps = eager_maps(model, input_ids=tokens, attention_mask=live.long(), use_cache=False)
    waad, fai = oracle(maps, groups, padded_bounds(live), mask, settings.window, settings.horizon)
    return reference.rhythm_credit(waad.float(), fai.float(), mask, **settings.credit_options())


def groups_from_maps(model, tokens: Tensor, live: Tensor, mask: Tensor, settings: RhythmSettings) -> tuple[list, list]:
    """The local and the global heads by the mean span of their rows in R, from maps that are kept in full."""
    maps = eager_maps(model, input_ids=tokens, attention_mask=live.long(), use_cache=False)
    chosen = {layer: maps[layer] for layer in attention_layers(find_decoder(model), settings.layers)}
    span = spans([(chosen, padded_bounds(live), mask)])
    ranked, count = sorted(span, key=lambda head: (span[head], head)), round(settings.head_quantile * len(span))
    return ranked[:count], ranked[-count:]


def ragged(prompts: list[int], responses: list[int], words: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses of these lengths, as lists of token ids."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda lengths: [torch.randint(2, words, (n,), generator=generator) for n in lengths]  # noqa: E731
    return draw(prompts), draw(responses)
