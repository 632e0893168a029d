"""ms-swift on the toy: its command line in this process, and an oracle that shapes advantages by full eager maps."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory

from rhythm_kernels import shape_advantages
from rhythm_kernels.integrations import ms_swift

from .ms_swift_maps import cases_of, gamma_of, groups_of, sequences
from .toy import PROMPTS, build_model, build_tokenizer, eager_copy, reward

CREDIT = "window=4,horizon=2:8"  # as in ms_swift_maps

REWARD = """
from swift.rewards import ORM, orms
from tests.integrations.toy import reward

class Even(ORM):
    def __call__(self, completions, **kwargs):
        return reward(completions)

orms["even"] = Even
"""


class Even(ORM):
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return reward(completions)


orms["even"] = Even


def write_toy(folder: Path) -> Path:
    """A model, its tokenizer, questions, and the reward as a plug-in, as files."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    for part in (build_model(), tokenizer):
        part.save_pretrained(folder / "model")
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS * 8]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [[*row["messages"], {"role": "assistant", "content": "w2 w4 w6"}] for row in rows]
    (folder / "experts.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in answers))
    (folder / "reward.py").write_text(REWARD)
    (folder / "rhythm.py").write_text("import rhythm_kernels.integrations.ms_swift\n")
    return folder


def command_line(toy: Path, out: Path, **changed: Any) -> list[str]:
    """What stands after `swift rlhf`: two float32 steps of eight responses on one core."""
    options = {
        "rlhf_type": "grpo",
        "model": toy / "model",
        "model_type": "qwen3",
        "template": "dummy",
        "check_model": False,
        "dataset": toy / "questions.jsonl",
        "reward_funcs": "even",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "beta": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "seed": 3,
        "output_dir": out,
        "add_version": False,
        **changed,
    }
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [toy / value if str(value).endswith(".jsonl") else value]
        words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


class _Run(SwiftRLHF):
    """ms-swift's pipeline, which keeps its trainer and counts the policy's forwards."""

    def train(self, trainer: Any) -> Any:
        self.trainer, trainer.forwards, trainer.gammas = trainer, 0, []

        def count(*_: Any) -> None:
            trainer.forwards += 1

        with _hooked(self.model, count):
            return super().train(trainer)


@contextmanager
def _hooked(model: Any, hook: Any):
    handle = model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def train(kind: type, toy: Path, out: Path, **changed: Any) -> Any:
    """Train by ms-swift's pipeline with `kind` for its GRPO trainer, plain ones too; returns the trainer."""
    choice = TrainerFactory.get_cls if issubclass(kind, ms_swift.RhythmGRPOTrainer) else ms_swift._chosen
    path = f"{kind.__module__}.{kind.__name__}"
    with (
        patch.dict(TrainerFactory.TRAINER_MAPPING, grpo=path),
        patch.object(TrainerFactory, "get_cls", staticmethod(choice)),
    ):
        run = _Run(command_line(toy, out, **changed))
        run.main()
    return run.trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


class FedFromMaps(GRPOTrainer):
    """Plain ms-swift, whose advantages are shaped by gamma from full eager maps of each response alone."""

    groups = None
    sign = "both"

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        decoder = eager_copy(self.model)
        for encoded in batch_encoded_inputs:
            batch, alone = encoded["grpo_batch"], sequences(encoded, self.template.padding_free)
            cases = cases_of(decoder, alone)
            self.groups = self.groups or groups_of(cases)
            gamma = gamma_of(cases, alone, self.groups, batch.completion_mask.shape[1])
            self.gammas.append(gamma)
            batch.advantages = shape_advantages(batch.advantages, gamma, self.sign)
