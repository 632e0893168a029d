"""Settings that libraries read only in the middle of a run, tried before anything is measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from .divergence import drawing
from .evaluation.generate import padded
from .settings import RecipeError

# Fields of transformers' GenerationConfig that a run sets otherwise, and how.
_SAID_ELSEWHERE = (
    ("max_new_tokens|max_length", "grpo.max_completion_length says how long a response may be"),
    ("num_return_sequences", "grpo.num_generations says how many responses a prompt gets"),
    ("do_sample", "the responses of a group are sampled"),
    (r"(pad|bos|eos)_token_id", "the tokens are those of the model's tokenizer"),
    (r"return_dict_in_generate|output_\w+", "of a response, its tokens are read"),
    (r"encoder_\w+|decoder_\w+", "the model has no encoder"),
    ("compile_config|disable_compile", "generation is not compiled"),
    (r"transformers_version|_\w+", "it changes nothing"),
)
_SHARES = ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")  # out of range, some of them would be ignored
_POINTS = 1000  # at which the learning rate of a long run is looked at


@contextmanager
def _trying(what: str) -> Iterator[None]:
    """Turn any error of a library into a `RecipeError` about the settings `what`, the only ones that it was given."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{what}: {type(error).__name__}: {error}") from error


def check_generation(config: Any) -> None:
    """Raise `RecipeError` for entries of `generation_kwargs` that do not exist or have a setting of their own."""
    known = vars(GenerationConfig())
    for name, value in (config.generation_kwargs or {}).items():
        said = [f"grpo.{name} says it"] if name in known and hasattr(config, name) else []
        said += [why for names, why in _SAID_ELSEWHERE if re.fullmatch(names, str(name))]
        if not said and not config.use_vllm and name not in known:
            said = ["transformers' GenerationConfig has no such field"]
        if said:
            raise RecipeError(f"grpo.generation_kwargs must not hold {name}, got {value!r}: {said[0]}")
        if name in _SHARES and not (isinstance(value, int | float) and 0 < value <= 1):
            raise RecipeError(f"grpo.generation_kwargs.{name} must be above 0 and at most 1, got {value!r}")
    if not config.use_vllm:
        with _trying("grpo.generation_kwargs"):
            GenerationConfig(do_sample=True, **(config.generation_kwargs or {})).validate(strict=True)


def try_out(trainer: Any, prompts: list[list[int]]) -> None:
    """Try what a trainer does only after the first evaluation; it and the random state stay as they were.

    Raises:
        RecipeError: for settings that cannot be carried out; it names them.
    """
    config, model = trainer.args, trainer.model
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        with _trying("grpo.learning_rate, grpo.lr_scheduler_type, grpo.lr_scheduler_kwargs"):
            _try_schedule(trainer)
        with _trying("grpo.torch_compile_backend, grpo.torch_compile_mode"):
            if config.torch_compile:
                torch.compile(torch.nn.Identity(), backend=config.torch_compile_backend, mode=config.torch_compile_mode)
        with _trying("grpo.gradient_checkpointing_kwargs"):
            _try_checkpointing(config)
        with _trying("grpo.dataloader_*"):
            torch.utils.data.DataLoader(
                [0],  # type: ignore[arg-type]
                num_workers=config.dataloader_num_workers,
                multiprocessing_context=config.dataloader_multiprocessing_context,
                prefetch_factor=config.dataloader_prefetch_factor,
                persistent_workers=config.dataloader_persistent_workers,
            )
        if not config.use_vllm:
            with _trying("grpo.generation_kwargs and the settings of sampling"):
                _try_generation(trainer, prompts)


def _try_schedule(trainer: Any) -> None:
    """The learning rates of the whole run, at each step of a short one and at a thousand of a long one."""
    config = trainer.args
    trainer.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = trainer.create_scheduler(config.max_steps, optimizer)
    trainer.lr_scheduler = None  # the run makes its own
    optimizer.step()
    for i in range(_POINTS + 1):
        schedule.last_epoch = round(i * config.max_steps / _POINTS) - 1  # a step adds one
        schedule.step()
        for rate in schedule.get_last_lr():
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"the learning rate would be {rate} in step {schedule.last_epoch}")


def _try_checkpointing(config: Any) -> None:
    options = dict(config.gradient_checkpointing_kwargs or {})
    if hasattr(config, "activation_checkpointing_kwargs"):  # since transformers 5.2x, with two entries of its own
        options |= config.activation_checkpointing_kwargs or {}
        options.pop("every_n_layers", None)
        options.pop("offload", None)
    if options:
        checkpoint(_layer, torch.zeros(1, requires_grad=True), **({"use_reentrant": False} | options))


def _layer(states: torch.Tensor) -> torch.Tensor:
    return 2 * states


def _try_generation(trainer: Any, prompts: list[list[int]]) -> None:
    """Two prompts, three tokens, as the trainer will sample them."""
    model, tokenizer = trainer.model, trainer.processing_class
    config = deepcopy(trainer.generation_config)
    config.max_new_tokens = 3
    inputs = padded(tokenizer, prompts[:2]).to(model.device)
    training = model.training
    with torch.no_grad(), drawing():
        responses = model.eval().generate(**inputs, generation_config=config)
    model.train(training)
    if not isinstance(responses, torch.Tensor) or len(responses) != len(inputs["input_ids"]):
        raise ValueError("they do not give one response to each prompt")
