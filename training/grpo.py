"""The trainer that a recipe describes, built and tried out before anything is measured."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rhythm_kernels.integrations.trl import RhythmGRPOConfig
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from .folder import CHECKPOINTS, TENSORBOARD
from .lora import check_adapted
from .models import check_room, written
from .questions import training_questions
from .reading import misfit, read_json
from .recipe import Recipe, RecipeError, half_precision
from .recorder import Recorder
from .settings import unheeded
from .sharding import check_sharding
from .task import CORRECTNESS, Task, as_asked
from .trainer import Trainer
from .trials import check_generation, try_out


def trainer_config(recipe: Recipe) -> RhythmGRPOConfig:
    """The trainer's configuration. Metrics are ours to write; TRL reports to the services of `grpo.report_to` alone."""
    given = dataclasses.asdict(recipe.grpo)
    _, rewards, more = (given.pop(name) for name in ("optimizer", "rewards", "more"))
    rhythm = {f"rhythm_{name}": value for name, value in dataclasses.asdict(recipe.rhythm).items()}
    try:
        recipe.rhythm.load_groups()
    except ValueError as error:
        raise RecipeError(f"rhythm.{error}") from error
    cuda = torch.cuda.is_available()
    every = recipe.output.checkpoint_steps
    if "LOCAL_RANK" in os.environ and not cuda:  # accelerate would number the CPU: torch.load does not understand that
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop("WORLD_SIZE", None)  # of some other program: on a CPU accelerate would wait for so many
    for name, value in (("grpo.temperature", recipe.grpo.temperature), ("eval.temperature", recipe.eval.temperature)):
        if 0 < value < 0.01 and recipe.model.dtype == "float16":
            raise RecipeError(
                f"{name} must be at least 0.01 with model.dtype=float16, got {value}: logits divided by less overflow"
            )
    if isinstance(path := more.get("accelerator_config"), str):  # read here, where it can be named
        more["accelerator_config"] = _read_accelerator(path)
    try:
        config = RhythmGRPOConfig(
            **{
                "output_dir": str(Path(recipe.output.path) / CHECKPOINTS),
                "reward_weights": [1.0] * len(rewards) + [0.0],  # the last one is correctness, to be logged
                "logging_steps": 1,
                "logging_nan_inf_filter": False,  # a loss that is NaN is to be seen
                "save_strategy": "no" if every is None else "steps",  # and after the last step
                "save_steps": every or 0,
                "report_to": "none",
                "run_name": Path(recipe.output.path).name,
                "disable_tqdm": True,
                "use_cpu": not cuda,
                "bf16": half_precision(recipe) == torch.bfloat16,
                "remove_unused_columns": False,
                **given,
                **more,
                **rhythm,
            }
        )
    except (TypeError, ValueError, ImportError, RuntimeError, OSError) as error:
        raise RecipeError(f"grpo, rhythm: {error}") from error
    unheeded(more, config)
    dealt = config.accelerator_config
    if config.world_size > 1 and (dealt.split_batches or dealt.dispatch_batches):
        raise RecipeError(
            "grpo.accelerator_config must hold neither split_batches nor dispatch_batches with several processes: each "
            "would take a part of its batch for all of it"
        )
    wanted = "fp16" if config.fp16 else "bf16" if config.bf16 else "no"
    if config.mixed_precision != wanted:
        raise RecipeError(
            f"mixed_precision of accelerate must be {wanted}, got {config.mixed_precision}: the recipe says it, by "
            "grpo.bf16 or grpo.fp16"
        )
    if project := more.get("project"):
        os.environ["WANDB_PROJECT"] = project  # transformers reads it there
    check_generation(config)
    if config.fp16 and (config.use_cpu or recipe.model.dtype == "float16"):  # ignored, or refused in the first step
        raise RecipeError("grpo.fp16 must be false without a GPU or with model.dtype=float16, got True")
    return config


def _read_accelerator(path: str) -> dict[str, Any]:
    try:
        content = read_json(Path(path).read_text(encoding="utf-8"))
        said = misfit(content, {})
    except OSError as error:
        said = error.strerror or str(error)
    except ValueError as error:
        said = str(error)
    if said:
        raise RecipeError(f"grpo.accelerator_config must be a file of JSON, got {path!r}: {said}")
    return content


def build_trainer(
    recipe: Recipe,
    config: RhythmGRPOConfig,
    model: Any,
    tokenizer: Any,
    task: Task,
    recorder: Recorder,
) -> Trainer:
    """The trainer of a recipe, with our progress bar instead of the libraries' printing.

    Makes its optimizer too and tries what it will need later, so that settings that cannot be carried out are refused
    before anything is measured.
    """
    from datasets import Dataset

    if recipe.grpo.beta and recipe.model.path is None:
        raise RecipeError(
            f"grpo.beta must be 0 with model.path=null, got {recipe.grpo.beta}: TRL reads the reference model there"
        )
    prompts = config.generation_batch_size // config.num_generations
    questions, rewards = training_questions(task, [*recipe.grpo.rewards, CORRECTNESS], prompts)
    check_room(recipe, model.config.get_text_config(), written(recipe, tokenizer, questions["prompt"]))
    lora = recipe.model.lora and recipe.model.lora.config()
    if lora:
        set_seed(config.seed)  # an adapter begins with random numbers, the same in all processes
    try:
        trainer = Trainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_dict(questions),
            processing_class=tokenizer,
            callbacks=[recorder],
            peft_config=lora,
        )
        trainer.sgd = recipe.grpo.optimizer == "sgd"
        attention_layers(find_decoder(model), recipe.rhythm.layers)  # the report shows their measures in any mode
        trainer.create_optimizer()
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"the trainer cannot be built: {error}") from error
    check_sharding(trainer)
    if lora:
        check_adapted(trainer.model)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # of the environment
            callback.logging_dir = str(Path(recipe.output.path) / TENSORBOARD)
    try_out(trainer, [as_asked(prompt, tokenizer).tokens for prompt in questions["prompt"][:2]])
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer
