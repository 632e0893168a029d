"""A toy that sees: random vision-language models over the toy's words, and two pictures that are not alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .toy import PROMPTS, build_tokenizer

IMAGE = "<|image_pad|>"
PADS = [IMAGE, "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


class Processor(ProcessorMixin):
    """Qwen's, without videos, which need torchvision."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        tokens = image_inputs["image_grid_thw"][image_idx].prod() // self.image_processor.merge_size**2
        return f"{IMAGE} " * int(tokens)


def build_processor() -> Processor:
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": PADS})
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return Processor(images, tokenizer, chat_template=TEMPLATE)


VISION = {
    "qwen2_vl": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "num_heads": 2},
    "qwen3_vl": {
        "depth": 1,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 16,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


def build_vision_model(kind: str) -> Any:
    torch.manual_seed(0)
    tokenizer = build_processor().tokenizer
    image, video = tokenizer.convert_tokens_to_ids(PADS)
    config = AutoConfig.for_model(
        kind,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **VISION[kind]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=0,
        tie_word_embeddings=True,
    )
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # attention that is not flat, so that heads differ and images matter
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(20)
    return model


def pictures() -> Dataset:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (16, width, 3), dtype=np.uint8)) for width in (16, 32)]
    rows = [
        {"prompt": [{"role": "user", "content": words}], "image": images[i % 2]} for i, words in enumerate(PROMPTS * 8)
    ]
    return Dataset.from_list(rows)
