"""A toy to train: a two-layer Qwen3 over twenty-four words, prompts of different lengths, a reward that varies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rhythm_kernels.probe.structure import find_decoder

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(22))]
PROMPTS = ["w1", "w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11"]  # padded on the left in every batch


def build_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def build_model(attention: str = "sdpa") -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # attention that is not flat, so that measures and heads differ
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    model.set_attn_implementation(attention)
    return model


def eager_copy(model: nn.Module) -> nn.Module:
    """The decoder of a model, with the same weights (adapters too) and eager attention, which returns its maps."""
    maps = copy.deepcopy(find_decoder(model).module).eval()
    maps.set_attn_implementation("eager")
    return maps


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * 8})


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of even words: differs within a group, and needs no answer to be right."""
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in text if w[0] == "w") / (len(text) + 1) for text in words]


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    """What both trainers are given: three float32 steps of sixteen responses on one core."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "beta": 0.0,
        "seed": 3,
        **changed,
    }


RHYTHM = {"rhythm_window": 4, "rhythm_horizon": (2, 8)}  # as short as the toy's responses


def train(kind: type, config: type, folder: Path, *, model: nn.Module | None = None, extra: Any = None, **changed: Any):
    """Train a fresh toy model; returns the trainer, whose `state.log_history` has the losses."""
    trainer = kind(
        model=model or build_model(),
        reward_funcs=reward,
        args=config(**options(folder, **changed)),
        train_dataset=dataset(),
        processing_class=build_tokenizer(),
        **(extra or {}),
    )
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
