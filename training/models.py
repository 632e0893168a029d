"""Loading what a recipe trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .recipe import ROOT, Recipe, RecipeError


def load(recipe: Recipe, path: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a recipe, or those saved at `path`, on the GPU where there is one."""
    local = ROOT / recipe.model.path
    source = str(path or (local if local.exists() else recipe.model.path))
    dtype = getattr(torch, recipe.model.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError(f"model.dtype is {recipe.model.dtype!r}: it must be float32, bfloat16 or float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=recipe.model.attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"model: {source} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
