"""Models that are divided over processes, by FSDP2 or DeepSpeed ZeRO-3: what can be, and the whole model again.

How they are divided, the file of `accelerate launch` says (`training/launch/`). Before and after its training a model
is whole, in the main process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from .lora import merged
from .models import load
from .recipe import Recipe, RecipeError


def check_sharding(trainer: Any) -> None:
    """Raise `RecipeError` where the model would not be divided as the launch says, or could not be evaluated before."""
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3 and trainer.args.sync_ref_model:
        raise RecipeError(
            "grpo.sync_ref_model must be false with ZeRO-3, got True: no checkpoint would have that model"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if not trainer.is_fsdp_enabled:
        raise RecipeError(
            "distributed_type must not be FSDP without a GPU for each process: accelerate would leave it out; "
            "training/launch/cpu.yaml is for CPUs"
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(f"fsdp_version must be 2, got {plugin.fsdp_version}: see training/launch/fsdp2.yaml")
    if plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading must be false, got true: each process loads the whole model, which is "
            "evaluated before it is divided"
        )


def is_divided(trainer: Any) -> bool:
    """Whether each process holds a part of the model's weights once it trains."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def gathered(trainer: Any) -> dict[str, Any] | None:
    """The weights of a divided model, whole and on the CPU, in the main process; all must call it."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights if trainer.accelerator.is_main_process else None


def made_whole(recipe: Recipe, weights: dict[str, Any]) -> Any:
    """A fresh model of the recipe with the weights of its training, those of an adapter merged."""
    model, _ = load(recipe)
    if recipe.model.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, recipe.model.lora.config())
    model.load_state_dict(weights)
    return merged(model)


@contextmanager
def whole_models(config: Any) -> Iterator[None]:
    """Models that are loaded in this block are whole and generate alone, where ZeRO-3 would divide them at once."""
    _let_divide(config, False)
    try:
        yield
    finally:
        _let_divide(config, True)


@contextmanager
def dividing(config: Any) -> Iterator[None]:
    """Inside of `whole_models`: a block in which ZeRO-3 may divide them."""
    _let_divide(config, True)
    try:
        yield
    finally:
        _let_divide(config, False)


def _let_divide(config: Any, may: bool) -> None:
    """Whether transformers divides the models that it loads from here on, where DeepSpeed is in use."""
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is not None:
        set_hf_deepspeed_config(plugin.dschf) if may else unset_hf_deepspeed_config()
