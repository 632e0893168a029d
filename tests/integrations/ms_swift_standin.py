"""A stand-in of ms-swift 4.6.0 for where it is not installed: the names, signatures and order of calls that the adapter
relies on, in words of our own. The row `ms-swift` of tests/matrix.sh compares the signatures with the package's.

It writes no text: a batch is of drawn tokens, a reward is a number drawn with it.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SIGNATURES = [
    f"GRPOTrainer.{name}"
    for name in (
        "__init__",
        "_get_per_token_logps_and_entropies",
        "_postprocess_batch",
        "_prepare_batch_inputs",
        "compute_loss",
        "_save_checkpoint",
        "_load_optimizer_and_scheduler",
    )
]


@dataclass
class GRPOBatch:
    completion_mask: Tensor
    truncated_mask: Tensor
    seq_lengths: Tensor
    old_per_token_logps: Tensor | None = None
    ref_per_token_logps: Tensor | None = None
    teacher_per_token_logps: Tensor | None = None
    advantages: Tensor | None = None
    logits_to_keep: int | None = None


class GRPOTrainer:
    def __init__(self, model=None, ref_model=None, reward_model=None, reward_funcs=None, *_args, **kwargs):
        self.model, self.ref_model, self.args, self.template = model, ref_model, kwargs["args"], kwargs["template"]
        self.beta = self.args.beta
        self.overlong_filter = self.args.overlong_filter
        self.dynamic_num_samples = False
        self.state = SimpleNamespace(global_step=0)
        self.accelerator = SimpleNamespace(
            is_main_process=True, process_index=0, device=torch.device("cpu"), reduce=lambda mine, reduction: mine
        )
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.saved: list[str] = []

    def _prepare_batch_inputs(self, samples):
        encoded = [{"model_inputs": inputs, "grpo_batch": batch} for inputs, batch in samples]
        for one in encoded:
            inputs, batch = one["model_inputs"], one["grpo_batch"]
            with torch.no_grad():
                batch.old_per_token_logps = self._get_per_token_logps_and_entropies(
                    self.model, inputs, batch, origin_data=None
                )[0]
                if self.beta:
                    reference = self.ref_model or self.model
                    batch.ref_per_token_logps = self._get_per_token_logps_and_entropies(
                        reference, inputs, batch, origin_data=None
                    )[0]
        return encoded

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        for encoded in batch_encoded_inputs:
            batch = encoded["grpo_batch"]
            rewards = torch.linspace(-1, 1, len(batch.completion_mask))
            batch.advantages = rewards[:, None].expand_as(batch.completion_mask).clone()

    def _get_per_token_logps_and_entropies(
        self, model, model_inputs, grpo_batch, compute_entropy=False, origin_data=None
    ):
        width, ids = grpo_batch.logits_to_keep, model_inputs["input_ids"]
        model_inputs["use_cache"] = False
        model_inputs["logits_to_keep"] = width + 1
        log_probs = model(**model_inputs).logits[:, -(width + 1) : -1].log_softmax(-1)
        found = log_probs.gather(-1, ids[:, -width:, None])[..., 0]
        entropies = -(log_probs.exp() * log_probs).sum(-1) if compute_entropy else None
        if self.template.padding_free:
            found, entropies = (None if x is None else self._rows(x, grpo_batch) for x in (found, entropies))
        return found, entropies

    @staticmethod
    def _rows(packed, batch):
        rows, start = torch.full(batch.completion_mask.shape, -1e10), 0
        for row, length in enumerate(batch.seq_lengths.tolist()):
            rows[row, rows.shape[1] - length :] = packed[0, start : start + length]
            start += length
        return rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs["model_inputs"], inputs["grpo_batch"])

    def _compute_loss(self, model, model_inputs, grpo_batch, origin_data=None):
        log_probs, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, compute_entropy=False)
        ratio, mask = (log_probs - grpo_batch.old_per_token_logps).exp(), grpo_batch.completion_mask
        loss = -torch.min(ratio * grpo_batch.advantages, ratio.clamp(0.8, 1.2) * grpo_batch.advantages)
        return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

    def _save_checkpoint(self, *args, **kwargs):
        self.saved.append(f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, *args, **kwargs):
        pass


class TrainerFactory:
    TRAINER_MAPPING: dict[str, str] = {}  # noqa: RUF012


def get_cls(args, mapping):
    module, name = mapping[getattr(args, "rlhf_type", None) or args.task_type].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def modules() -> dict[str, ModuleType]:
    """What `import swift...` is to find."""
    TrainerFactory.TRAINER_MAPPING = {
        "causal_lm": "swift.trainers.Seq2SeqTrainer",
        "gkd": "swift.rlhf_trainers.GKDTrainer",
        "grpo": "swift.rlhf_trainers.GRPOTrainer",
    }
    TrainerFactory.get_cls = staticmethod(get_cls)
    package, trainers, rlhf = (ModuleType(name) for name in ("swift", "swift.trainers", "swift.rlhf_trainers"))
    package.__version__ = "4.6.0"
    trainers.TrainerFactory, rlhf.GRPOTrainer = TrainerFactory, GRPOTrainer
    trainers.Seq2SeqTrainer = object
    return {module.__name__: module for module in (package, trainers, rlhf)}


def arguments(**changed: Any) -> SimpleNamespace:
    """What the adapter reads of ms-swift's `GRPOConfig`."""
    defaults = {
        "use_liger_kernel": False,
        "async_generate": False,
        "advantage_reweight": None,
        "sdar_loss_coef": 0.0,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "overlong_filter": False,
        "beta": 0.0,
        "seed": 3,
        "should_save": True,
        "output_dir": "",
    }
    return SimpleNamespace(**{**defaults, **changed})


def batch_of(packed: bool, vocabulary: int = 24) -> tuple[dict[str, Tensor], GRPOBatch]:
    """Four responses as collated, padded on the right or packed, with a hole in the mask of the second."""
    prompts, lengths = [1, 4, 2, 5], [18, 11, 15, 9]
    rows = [torch.randint(2, vocabulary, (p + n,)) for p, n in zip(prompts, lengths)]
    masks = [torch.arange(p + n) >= p for p, n in zip(prompts, lengths)]
    masks[1][prompts[1] + 3 : prompts[1] + 6] = False
    if packed:
        ids, mask = torch.cat(rows)[None], torch.cat(masks)
        width = len(mask) - int(mask.nonzero()[0])
        shares = [len(rows[0]) - prompts[0], *(len(row) for row in rows[1:])]
        grid, start = torch.zeros(len(rows), width, dtype=torch.bool), len(mask) - width
        for row, share in enumerate(shares):
            grid[row, width - share :] = mask[start : start + share]
            start += share
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        inputs = {"input_ids": ids, "position_ids": positions}
    else:
        length = max(map(len, rows))
        ids, live, whole = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        for i, (row, mask) in enumerate(zip(rows, masks)):
            ids[i, : len(row)], live[i, : len(row)], whole[i, : len(row)] = row, 1, mask.long()
        width = max(length - p for p in prompts)
        grid, shares = whole[:, -width:].bool(), [width] * len(rows)
        inputs = {"input_ids": ids, "attention_mask": live}
    truncated = torch.tensor([True, False, False, False])
    return inputs, GRPOBatch(grid, truncated, torch.tensor(shares), logits_to_keep=width)


def forget() -> None:
    """Of the adapter's modules, so that the next import is of what `swift` then is."""
    for name in [name for name in sys.modules if name.startswith("rhythm_kernels.integrations.ms_swift")]:
        del sys.modules[name]
