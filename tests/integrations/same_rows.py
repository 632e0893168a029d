"""A program: train the toy on given completions, as one process or as its share of several; write what each row got.

Run as `python tests/integrations/same_rows.py FOLDER CASES`, or by torchrun or `accelerate launch`. CASES is JSON, a
list of dictionaries: `name`, `lora`, and settings of `RhythmGRPOConfig` as one process takes them, whose batch is
divided by the number of processes. Each process writes `NAME-RANK.json`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from tests.integrations.sharding_on_cpu import shard_on_cpu
from tests.integrations.toy import RHYTHM, WORDS, build_model, build_tokenizer, dataset, losses, options, reward


class Given(RhythmGRPOTrainer):
    """Its completions depend on a row's place in the batch of all processes, its prompt and the step: on no process."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._completion(first + i, ids) for i, ids in enumerate(prompt_ids)], None

    def _completion(self, row, prompt):
        draws = random.Random(repr((self.state.global_step, row, prompt)))
        words = [draws.randrange(2, len(WORDS)) for _ in range(draws.randrange(8, self.args.max_completion_length))]
        return [*words, 1]  # the last word ends it

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        live = inputs["completion_mask"].bool()
        for b, prompt in enumerate(inputs["prompt_mask"].bool()):
            tokens = [*inputs["prompt_ids"][b][prompt].tolist(), *inputs["completion_ids"][b][live[b]].tolist()]
            gamma = inputs["rhythm_gamma"][b][live[b]].tolist()
            self.__dict__.setdefault("rows", []).append([self.state.global_step, tokens, gamma])
        return loss


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, of which FSDP2 leaves a part here."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def carry_out(folder: Path, case: dict) -> None:
    case = dict(case)
    name, lora, processes = case.pop("name"), case.pop("lora", False), int(os.environ.get("WORLD_SIZE", 1))
    case["per_device_train_batch_size"] //= processes
    extra = {}
    if lora:
        from peft import LoraConfig

        torch.manual_seed(0)
        extra["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = Given(
        build_model(),
        reward,
        RhythmGRPOConfig(**options(folder / name, **case), **RHYTHM),
        dataset(),
        processing_class=build_tokenizer(),
        **extra,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    groups = trainer.rhythm_groups
    trained = {name: whole(p.detach()) for name, p in trainer.model.named_parameters() if p.requires_grad}
    content = {
        "kinds": sorted({type(p).__name__ for p in trainer.model.parameters()}),
        "wrapper": type(trainer.model_wrapped).__name__,
        "groups": groups and [groups.local, groups.global_],
        "rows": sorted(trainer.rows),
        "losses": losses(trainer),
        "gamma": [line["rhythm/gamma_mean"] for line in trainer.state.log_history if "rhythm/gamma_mean" in line],
        "weights": torch.cat([p.flatten() for p in trained.values()]).tolist(),
    }
    (folder / f"{name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(content))
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpu()
    for case in json.loads(sys.argv[2]):
        carry_out(Path(sys.argv[1]), case)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
