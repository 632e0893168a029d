"""The trainer of a run: its configuration, the metrics it adds to TRL's, and the file it writes them to."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from .folder import CHECKPOINTS, saving
from .questions import training_questions
from .reading import misfit, read_json
from .recipe import Recipe, RecipeError, half_precision
from .settings import unheeded
from .task import CORRECTNESS, Task, as_asked
from .trials import check_generation, try_out


def trainer_config(recipe: Recipe) -> RhythmGRPOConfig:
    """The trainer's configuration. Metrics are ours to write, so TRL reports and saves nothing itself."""
    given = dataclasses.asdict(recipe.grpo)
    _, rewards, more = (given.pop(name) for name in ("optimizer", "rewards", "more"))
    rhythm = {f"rhythm_{name}": value for name, value in dataclasses.asdict(recipe.rhythm).items()}
    try:
        recipe.rhythm.load_groups()
    except ValueError as error:
        raise RecipeError(f"rhythm.{error}") from error
    cuda = torch.cuda.is_available()
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
                "save_strategy": "no",
                "report_to": "none",
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
    unheeded(recipe.grpo.more, config)
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


class _Trainer(RhythmGRPOTrainer):
    """Adds to the metrics the length of each batch and the bytes that its attention maps would have taken."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        (batch, prompt), completion = inputs["prompt_ids"].shape, inputs["completion_ids"].shape[1]
        config, length = self.model.config, prompt + completion
        maps = batch * config.num_hidden_layers * config.num_attention_heads * length**2 * 4
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["row_tokens"].append(length)
        metrics["map_bytes"].append(maps)
        return super()._compute_loss(model, inputs)


def build_trainer(
    recipe: Recipe,
    config: RhythmGRPOConfig,
    model: Any,
    tokenizer: Any,
    task: Task,
    recorder: Recorder,
) -> RhythmGRPOTrainer:
    """The trainer of a recipe, with our progress bar instead of the libraries' printing.

    Makes its optimizer too and tries what it will need later, so that settings that cannot be carried out are refused
    before anything is measured.
    """
    from datasets import Dataset

    if recipe.grpo.beta and recipe.model.path is None:
        raise RecipeError(
            f"grpo.beta must be 0 with model.path=null, got {recipe.grpo.beta}: TRL reads the reference model there"
        )
    questions, rewards = training_questions(task, [*recipe.grpo.rewards, CORRECTNESS])
    optimizer = None
    if recipe.grpo.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    try:
        trainer = _Trainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_dict(questions),
            processing_class=tokenizer,
            callbacks=[recorder],
            optimizers=(optimizer, None),
        )
        attention_layers(find_decoder(model), recipe.rhythm.layers)  # the report shows their measures in any mode
        trainer.create_optimizer()
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"the trainer cannot be built: {error}") from error
    try_out(trainer, [as_asked(prompt, tokenizer).tokens for prompt in questions["prompt"][:2]])
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


_NAMES = {  # in metrics.jsonl: in TRL's log
    "loss": "loss",
    "reward": "reward",
    "accuracy": "rewards/correctness/mean",
    "response_tokens": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "step_seconds": "step_time",
    "rhythm_seconds": "rhythm/seconds",
    "calibration_seconds": "rhythm/calibration_seconds",
    "gamma_mean": "rhythm/gamma_mean",
    "boosted_share": "rhythm/boosted_share",
    "waad_mean": "rhythm/waad_mean",
    "fai_mean": "rhythm/fai_mean",
    "certain_share": "rhythm/certain_share",
    "bonus_certain_share": "rhythm/bonus_certain_share",
    "bonus_entropy_ratio": "rhythm/bonus_entropy_ratio",
    "row_tokens": "row_tokens",
    "map_bytes": "map_bytes",
}


_SHOWN = (("right", "accuracy", "{:.0%}"), ("tokens", "response_tokens", "{:.0f}"), ("gamma", "gamma_mean", "{:.2f}"))


class Recorder(TrainerCallback):
    """Writes one line a step to `metrics.jsonl`, as it happens, and moves the progress bar."""

    def __init__(self, path: Path, steps: int) -> None:
        self.lines: list[dict[str, float]] = []
        self._path, self._steps = path, steps

    def __enter__(self) -> Recorder:
        self.started = time.perf_counter()
        self._file = self._path.open("w", encoding="utf-8")
        self._bar = tqdm(total=self._steps, desc="train", unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        self._file.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step}
        line |= {ours: logs[theirs] for ours, theirs in _NAMES.items() if logs.get(theirs) is not None}
        self.lines.append(line)
        with saving(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        told = (
            ("right", "accuracy", "{:.0%}"),
            ("tokens", "response_tokens", "{:.0f}"),
            ("gamma", "gamma_mean", "{:.2f}"),
        )
        shown = {name: form.format(line[key]) for name, key, form in told if key in line}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(state.global_step - self._bar.n)
