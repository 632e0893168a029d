"""ms-swift on the toy: its command line in this process, and an oracle that shapes advantages by full eager maps."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory

from rhythm_kernels import HeadGroups, reference, shape_advantages

from ..probe.probe_oracle import eager_maps, oracle, spans
from .toy import PROMPTS, build_model, build_tokenizer, eager_copy, reward

CREDIT = "window=4,horizon=2:8"  # as short as the toy's responses
LAYERS = [1, 2]  # `middle5` of four layers
GROUP = round(0.3 * 8)

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
        values = value if isinstance(value, list) else [value]
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
    """Train by ms-swift's pipeline with `kind` for its GRPO trainer; returns the trainer."""
    before = TrainerFactory.TRAINER_MAPPING["grpo"]
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{kind.__module__}.{kind.__name__}"
    try:
        run = _Run(command_line(toy, out, **changed))
        run.main()
    finally:
        TrainerFactory.TRAINER_MAPPING["grpo"] = before
    return run.trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def sequences(encoded: dict[str, Any], packed: bool) -> list[tuple[torch.Tensor, torch.Tensor, slice, torch.Tensor]]:
    """Of each response of a micro-batch: its tokens alone, its mask over them, and where that stands in `(B, T)`.

    The fourth is the part of the mask that the slice names, for the batch's own frame.
    """
    inputs, batch = encoded["model_inputs"], encoded["grpo_batch"]
    found, ids = [], inputs["input_ids"]
    width = batch.completion_mask.shape[1]
    if packed:
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist() + [ids.shape[1]]
        rows = [ids[0, a:b] for a, b in zip(starts, starts[1:])]
        ends = [width] * len(rows)
    else:
        live = inputs["attention_mask"].bool()
        rows = [row[there] for row, there in zip(ids, live)]
        length = ids.shape[1]
        ends = [width - length + int(there.nonzero().max()) + 1 for there in live]
    for row, end, mask in zip(rows, ends, batch.completion_mask):
        share = min(len(row), end)
        inside = slice(end - share, end)
        whole = torch.zeros(len(row), dtype=torch.bool)
        whole[len(row) - share :] = mask[inside]
        assert int(whole.sum()) == int(mask.sum())
        found.append((row, whole, inside, mask))
    return found


class FedFromMaps(GRPOTrainer):
    """Plain ms-swift, whose advantages are shaped by gamma from full eager maps of each response alone."""

    groups = None
    sign = "both"

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        maps_of = eager_copy(self.model)
        for encoded in batch_encoded_inputs:
            batch, alone = encoded["grpo_batch"], sequences(encoded, self.template.padding_free)
            cases = []
            for tokens, mask, _, _ in alone:
                maps = eager_maps(maps_of, input_ids=tokens[None], use_cache=False)
                cases.append(({layer: maps[layer] for layer in LAYERS}, [(0, 0, len(tokens))], mask[None]))
            if self.groups is None:
                found = spans(cases)
                ranked = sorted(found, key=lambda head: (found[head], head))
                self.groups = HeadGroups(ranked[:GROUP], ranked[-GROUP:])
            gamma = torch.ones(batch.completion_mask.shape)
            for row, ((maps, bounds, mask), (_, _, inside, _)) in enumerate(zip(cases, alone)):
                waad, fai = oracle(maps, self.groups, bounds, mask, window=4, horizon=(2, 8))
                one = reference.rhythm_credit(waad.float(), fai.float(), mask)[0]
                gamma[row, inside] = one[len(one) - (inside.stop - inside.start) :]
            self.gammas.append(gamma)
            batch.advantages = shape_advantages(batch.advantages, gamma, self.sign)

