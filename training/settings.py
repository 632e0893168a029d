"""What a setting may be: its type, its words, its range; and which of TRL's settings a run does not honour."""

from __future__ import annotations

import enum
import importlib.util
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal


class RecipeError(ValueError):
    """Something in a recipe or an override that the user can put right."""


LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]

# Fields whose type is text in TRL, and which it reads only when the first loss is computed: the words it knows.
TRL_WORDS: dict[str, Any] = {
    "importance_sampling_level": Literal["token", "sequence"],
    "scale_rewards": Literal["group", "batch", "none", True, False],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "vllm_mode": Literal["colocate", "server"],
    "vllm_model_impl": Literal["vllm", "transformers"],
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
}

# The types of all fields that are not taken as TRL declares them.
TRL_KINDS: dict[str, Any] = TRL_WORDS | {
    "report_to": Literal["none", "wandb", "tensorboard"] | list[Literal["wandb", "tensorboard"]],
}

# Ranges that nothing else checks, or only once the evaluation before training is over. The section rhythm checks itself
# (`RhythmSettings`), and `_coerce` takes finite numbers only.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("at least 1 and at most 1000000", lambda x: 1 <= x <= 10**6, "task.train_size eval.size"),
    (
        "at least 1",
        lambda x: isinstance(x, str) or x >= 1,
        "eval.batch_size grpo.max_steps grpo.per_device_train_batch_size grpo.steps_per_generation "
        "grpo.gradient_accumulation_steps grpo.max_completion_length grpo.num_iterations grpo.ref_model_sync_steps "
        "grpo.num_completions_to_print grpo.pad_to_multiple_of grpo.dataloader_prefetch_factor eval.max_tokens "
        "grpo.ddp_bucket_cap_mb grpo.ddp_timeout grpo.vllm_tensor_parallel_size model.lora.r "
        "output.checkpoint_steps output.checkpoints_kept",
    ),
    (
        "at least 1 and at most 10000, or a mapping of such by test set",
        lambda x: all(1 <= count <= 10_000 for count in ([x] if isinstance(x, int) else x.values())),
        "eval.samples",
    ),
    ("at least 2", lambda x: x >= 2, "grpo.num_generations"),
    (
        "at least 0",
        lambda x: x >= 0,
        "grpo.learning_rate grpo.weight_decay grpo.max_grad_norm grpo.beta grpo.adam_epsilon grpo.epsilon "
        "grpo.epsilon_high grpo.delta grpo.top_k eval.top_k grpo.dataloader_num_workers grpo.neftune_noise_alpha",
    ),
    (
        "at least 0, and a whole number of steps, or below 1 a share of them",
        lambda x: 0 <= x < 1 or (x >= 1 and x == int(x)),
        "grpo.warmup_steps",
    ),
    (
        "above 0",
        lambda x: x > 0,
        "grpo.temperature grpo.repetition_penalty grpo.sapo_temperature_pos grpo.sapo_temperature_neg model.lora.alpha",
    ),
    ("at least 0, where 0 is greedy", lambda x: x >= 0, "eval.temperature"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "grpo.top_p eval.top_p grpo.vllm_gpu_memory_utilization"),
    (
        "at least 0 and at most 1",
        lambda x: 0 <= x <= 1,
        "grpo.min_p grpo.top_entropy_quantile grpo.ref_model_mixup_alpha",
    ),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "grpo.adam_beta1 grpo.adam_beta2 model.lora.dropout"),
    ("at least 0 and below 2**32", lambda x: 0 <= x < 2**32, "grpo.seed grpo.data_seed eval.seed"),
    ("a list of at least one", lambda x: len(x) > 0, "grpo.rewards model.lora.target_modules"),
    ("the name of a folder", lambda x: x.strip() and "\0" not in x, "output.path model.path"),
)
_RANGE_OF = {name: (words, test) for words, test, names in _RANGES for name in names.split()}

# Fields of `trl.GRPOConfig` that a run would ignore or overrule, or that would stop it half-way, and why.
_REFUSED = (
    (
        r"resume_from_checkpoint|ignore_data_skip|restore_\w+",
        "train --resume RUN goes on with a run",
    ),
    ("dataloader_persistent_workers", "with workers that stay, a run that goes on would draw other random numbers"),
    (r"save_\w+|enable_jit_checkpoint", "output.checkpoint_steps and output.checkpoints_kept say it"),
    (r"push_to_hub|hub_\w+|log_completions_hub_repo", "nothing is uploaded; the model is saved in output.path"),
    (
        r"do_\w+|\w*eval_\w+|\w+_eval|prediction_loss_only|include_for_metrics|load_best_model_at_end"
        r"|metric_for_best_model|greater_is_better",
        "a run evaluates before and after its training, as the section eval says, and keeps its last model",
    ),
    (r"fsdp\w*", "how processes divide a model, the file of accelerate launch says: training/launch/fsdp2.yaml"),
    (r"deepspeed", "how processes divide a model, the file of accelerate launch says: training/launch/zero3.yaml"),
    (r"local_rank", "accelerate launch tells each process its number"),
    (r"parallelism_config", "processes share a batch, or a model too by FSDP2 or ZeRO-3: no layer is divided"),
    (r"\w+_on_each_node", "the main process writes, into a folder that all nodes see"),
    (
        r"logging_\w+|log_level\w*|disable_tqdm|skip_memory_metrics|include_num_input_tokens_seen",
        "metrics are written to metrics.jsonl in output.path, a line a step",
    ),
    (r"trackio_\w+", "grpo.report_to knows wandb and tensorboard"),
    (r"output_dir|overwrite_output_dir", "the folder of a run is output.path"),
    (r"optim|optim_\w+", "the optimizer is grpo.optimizer"),
    (r"reward_weights", "the rewards of grpo.rewards are added up"),
    (r"num_train_epochs", "grpo.max_steps says how long a run is"),
    ("chat_template_kwargs", "evaluation asks without them: change the chat template that the tokenizer brings"),
    (r"generation_batch_size", "grpo.steps_per_generation says how many batches are generated at once"),
    (r"model_init_kwargs|trust_remote_code", "the model is loaded as the section model says"),
    (
        r"label_\w+|length_column_name|group_by_length|train_sampling_strategy|remove_unused_columns"
        r"|max_tool_calling_iterations",
        "the task gives the prompts and what is read with them",
    ),
)
# Settings that need a package: the value that needs none, and the package of each other value, or of all others.
_NEEDS: dict[str, tuple[str, str | dict[str, str]]] = {
    "grpo.use_vllm": ("false", "vllm"),
    "grpo.use_liger_kernel": ("false", "liger_kernel"),
    "grpo.report_to": ("none", {"wandb": "wandb", "tensorboard": "tensorboard"}),
    "model.lora": ("null", "peft"),
}
_PATHS = ("output.path", "model.path", "rhythm.groups", "grpo.accelerator_config")

# Fields that are read only if another has a certain value: their names, a test of the configuration, what is missing.
_HEEDED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "(gradient|activation)_checkpointing_kwargs",
        lambda config: config.gradient_checkpointing,  # of the two names for one thing, transformers fills in both
        "grpo.gradient_checkpointing=true",
    ),
    (r"sapo_\w+", lambda config: config.loss_type == "sapo", "grpo.loss_type=sapo"),
    (r"vespo_\w+", lambda config: config.loss_type == "vespo", "grpo.loss_type=vespo"),
    (r"vllm_\w+", lambda config: config.use_vllm, "grpo.use_vllm=true"),
    (r"vllm_(server_\w+|group_port)", lambda config: config.vllm_mode == "server", "grpo.vllm_mode=server"),
    (
        "vllm_(gpu_memory_utilization|max_model_length|tensor_parallel_size|enable_sleep_mode)",
        lambda config: config.vllm_mode == "colocate",  # a server has been told when it was started
        "grpo.vllm_mode=colocate",
    ),
    (r"ref_model_\w+", lambda config: config.sync_ref_model, "grpo.sync_ref_model=true"),
    (r"ddp_\w+", lambda config: config.world_size > 1, "several processes, as `accelerate launch` starts them"),
    (r"ds3_\w+", lambda config: config.deepspeed_plugin is not None, "a launch with training/launch/zero3.yaml"),
    ("run_name|project", lambda config: "wandb" in config.report_to, "grpo.report_to=wandb"),
)


def unheeded(given: Mapping[str, Any], config: Any) -> None:
    """Raise `RecipeError` for settings of grpo that a `trl.GRPOConfig` would carry and nothing would read."""
    for key, value in given.items():
        for names, heeded, wanted in _HEEDED:
            if value and re.fullmatch(names, key) and not heeded(config):
                raise RecipeError(f"grpo.{key} must not be set, got {value!r}: nothing heeds it without {wanted}")


def refuse(key: str, value: Any = None) -> None:
    """Raise `RecipeError` for a field of `trl.GRPOConfig` that a run would not honour."""
    reasons = [why for names, why in _REFUSED if re.fullmatch(names, key)]
    if key == "warmup_ratio":  # of older releases
        reasons = [f"use warmup_steps={value}, where a number below 1 is a share of the steps"]
    if reasons:
        raise RecipeError(f"grpo.{key} must not be set, got {value!r}: {reasons[0]}")


def checked(name: str, value: Any, kind: Any) -> Any:
    """The value of a setting, converted to its type and checked against its range.

    Args:
        name: as in the recipe, `section.key`.
        value: as YAML gives it.
        kind: the type that the setting is declared with.

    Raises:
        RecipeError: for a value of another type or out of range; the message says what it must be.
    """
    try:
        value = _coerce(value, kind)
    except ValueError as error:
        raise RecipeError(f"{name} must be {str(error) or _in_words(kind)}, got {value!r}") from None
    if name in _PATHS and isinstance(value, str):
        value = os.path.expanduser(value)
    words, test = _RANGE_OF.get(name, ("", lambda _: True))
    if value is not None and not test(value):
        raise RecipeError(f"{name} must be {words}, got {value!r}")
    for package in _packages(name, value):
        if importlib.util.find_spec(package) is None:
            without = _NEEDS[name][0]
            raise RecipeError(f"{name} must be {without}, got {value!r}: the package {package} is not installed")
    return value


def _packages(name: str, value: Any) -> list[str]:
    """The packages that a value of a setting needs."""
    _, needed = _NEEDS.get(name, ("", ""))
    if not value or not needed:
        return []
    if isinstance(needed, str):
        return [needed]
    return [needed[one] for one in ([value] if isinstance(value, str) else value) if one in needed]


def _coerce(value: Any, kind: Any) -> Any:
    """`value` converted to the type `kind`; a `ValueError` otherwise, whose text, if any, says what is wanted.

    YAML 1.1 reads `1e-4` as text, `1` as an integer and `no` as false. Where the type is a number or one of some
    words, they are taken for what they look like.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if words := _words(kind):
        value = "no" if value is False and "no" in words else value
        if any(value == word and type(value) is type(word) for word in words):
            return value
    elif kind is Any:
        return value
    elif origin in (typing.Union, types.UnionType):
        said = ""
        for option in arguments:
            try:
                return _coerce(value, option)
            except ValueError as error:
                said = said or str(error)
        raise ValueError(said)
    elif origin in (list, tuple):
        kinds = arguments * len(value) if origin is list and isinstance(value, list | tuple) else arguments
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            try:
                return origin(_coerce(item, of) for item, of in zip(value, kinds))
            except ValueError:
                pass
    elif kind is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                raise ValueError from None
            if not math.isfinite(number):
                raise ValueError("a finite number")
            return number
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) >= 2**63:
                raise ValueError("a whole number below 2**63")
            return value
    elif origin is dict and isinstance(value, dict) and arguments:
        try:
            return {_coerce(key, arguments[0]): _coerce(item, arguments[1]) for key, item in value.items()}
        except ValueError:
            pass
    elif isinstance(value, origin or kind):
        return value
    raise ValueError


def _words(kind: Any) -> list[Any]:
    """The words that a `Literal` or an enumeration allows; transformers writes the latter as `SomeEnum | str`."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [member.value for member in kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        enums = [one for one in typing.get_args(kind) if isinstance(one, type) and issubclass(one, enum.Enum)]
        return [word for one in enums for word in _words(one)]
    return []


def _in_words(kind: Any) -> str:
    if words := _words(kind):
        return f"one of {', '.join(map(str, words))}"
    origin, arguments = typing.get_origin(kind), [_in_words(argument) for argument in typing.get_args(kind)]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(arguments)
    if origin is list:
        return f"a list, each entry {arguments[0]}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(arguments)}"
    if origin is dict and Any not in typing.get_args(kind):
        return f"a mapping of {arguments[0]} to {arguments[1]}"
    kinds = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", type(None): "null"}
    return kinds.get(kind, "a mapping" if dict in (kind, origin) else str(kind))
