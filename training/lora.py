"""LoRA: a model is trained through small matrices beside its own, which peft adds and which are merged at the end."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from .settings import RecipeError, checked


@dataclass
class Lora:
    """The key `lora` of a recipe's section `model`."""

    r: int = 16  # the rank of each pair of matrices
    alpha: float = 32.0  # what they add is scaled by alpha / r
    dropout: float = 0.0  # of what goes into them, in training forwards
    target_modules: str | list[str] = (
        "all-linear"  # a list of ends of names; all-linear: each linear layer but the output
    )

    def config(self) -> Any:
        """As peft and TRL take it."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )


def read_lora(given: dict[str, Any] | Lora | None) -> Lora | None:
    """The settings of LoRA from what stands under `model.lora`.

    Raises:
        RecipeError: for a key that there is not, or a value that it does not take.
    """
    if given is None or isinstance(given, Lora):
        return given
    kinds = {"r": int, "alpha": float, "dropout": float, "target_modules": str | list[str]}
    for key in given:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kinds)}"
            raise RecipeError(f"model.lora must not have the key {key!r}; {hint}")
    return Lora(**{key: checked(f"model.lora.{key}", value, kinds[key]) for key, value in given.items()})


def check_adapted(model: Any) -> None:
    """Raise `RecipeError` where merging would change more than an adapter does: weights that two layers share."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(embedding, "base_layer") and embedding.base_layer.weight is output.weight:
        raise RecipeError(
            "model.lora.target_modules must not hold the embedding of this model: its weights are those of the output, "
            "which merging would change too"
        )


def merged(model: Any) -> Any:
    """A model as it is without adapters: theirs are added to its own weights; one that has none as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
