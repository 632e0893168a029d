"""Models that cannot be measured are refused when the trainer is built, but not by modes that do not measure."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer

from .toy import WORDS, build_tokenizer, dataset, options, reward


def gemma3():
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    first = len(WORDS)
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_id=first,
        boi_token_id=first + 1,
        eoi_token_id=first + 2,
    )
    return AutoModelForImageTextToText.from_config(config)


def build(tmp_path, **changed):
    return RhythmGRPOTrainer(
        model=gemma3(),
        reward_funcs=reward,
        args=RhythmGRPOConfig(**options(tmp_path, **changed)),
        train_dataset=dataset(),
        processing_class=build_tokenizer(),
    )


def test_masks_made_outside_of_the_language_model(tmp_path):
    with pytest.raises(ValueError, match="Gemma3Model makes the attention masks outside of its language model"):
        build(tmp_path)
    assert build(tmp_path, rhythm_mode="entropy").rhythm_groups is None
