"""How TRL lays out a generation batch, and what follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

__all__ = [
    "is_off_policy",
    "is_policy",
    "is_whole_batch",
    "keeps_old_log_probs",
    "last_token",
    "log_prob_arguments",
    "response_mask",
    "row_marks",
    "whole_batch",
]

# The methods of TRL that name what a log-prob pass takes. From 1.14.0 to 1.14.2 the first hands all on to the second.
PASSES = ("_get_per_token_logps_and_entropies", "_full_logits_logps")


def response_mask(inputs: dict[str, Any]) -> Tensor:
    """`(B, T)`: completion tokens that the model itself wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def row_marks(inputs: Mapping[str, Any]) -> Tensor:
    """`(B, 2)`, int64: a number for the tokens of each response, and how many places it has with its padding."""
    tokens = inputs["completion_ids"].long()
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return torch.stack([(tokens * places**2).sum(dim=1), places.new_full((len(tokens),), len(places))], dim=1)


def last_token(mask: Tensor) -> Tensor:
    """`(B,)`: one past the last masked place; 0 where there is none."""
    return (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)


def whole_batch(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask of prompts and completions, `(B, S)` each."""
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    return ids, mask


def is_whole_batch(batch: Mapping[str, Any], input_ids: Tensor, attention_mask: Tensor) -> bool:
    """Whether a pass over these tokens, `(B, S)`, is one over this batch."""
    pairs = zip(whole_batch(batch), (input_ids, attention_mask))
    return all(whole.shape == given.shape and bool((whole == given).all()) for whole, given in pairs)


def is_policy(trainer: GRPOTrainer, model: Any) -> bool:
    """Whether it is the model that is trained, however it is wrapped: no reference, and no teacher."""
    return next(model.parameters()) is next(trainer.model.parameters())


def is_off_policy(trainer: GRPOTrainer) -> bool:
    """Whether the policy changes before a generation batch was trained on as often as it will be."""
    return trainer.args.gradient_accumulation_steps % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def keeps_old_log_probs(trainer: GRPOTrainer) -> bool:
    """Whether TRL makes an old-log-prob pass."""
    corrects = trainer.use_vllm and getattr(trainer, "vllm_importance_sampling_correction", False)
    return bool(is_off_policy(trainer) or corrects)


def log_prob_arguments(
    trainer: GRPOTrainer, output: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
    """What TRL's log-prob function takes after the model for a whole generation batch, as TRL's own passes give it.

    Returns the positional arguments, and those by name: the images that there are, and the size of its chunks.
    """
    input_ids, attention_mask = whole_batch(output)
    passes = (getattr(GRPOTrainer, name) for name in PASSES if hasattr(GRPOTrainer, name))
    names = {name for method in passes for name in inspect.signature(method).parameters}
    named = {name: output[name] for name in names if name in output}
    args = trainer.args
    size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    return (input_ids, attention_mask, output["completion_ids"].shape[1]), {**named, "batch_size": size}
