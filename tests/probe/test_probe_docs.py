"""docs/probe.md, typed by a user: its blocks run in order, with tiny models in the place of the hub's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rhythm_kernels import RhythmProbe

from . import probe_models as models

DOCS = Path(__file__).parents[2] / "docs" / "probe.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


class Tokenizer:
    """What the first block asks of a tokenizer: left-padded ids."""

    @classmethod
    def from_pretrained(cls, name, padding_side):
        assert padding_side == "left"
        return cls()

    def __call__(self, texts, return_tensors, padding):
        mask = torch.ones(len(texts), 9, dtype=torch.long)
        mask[0, :3] = 0
        return {"input_ids": models.tokens(len(texts), 9), "attention_mask": mask}


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral"])
def test_blocks(family, monkeypatch, tmp_path):
    class Model:
        @classmethod
        def from_pretrained(cls, name, attn_implementation="sdpa"):
            return models.tiny_model(family, attn_implementation)

    monkeypatch.chdir(tmp_path)
    padded, packed, loop, rhythm = BLOCKS
    hub = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    assert hub in padded
    padded = padded.replace(hub, "")
    names: dict = {"AutoModelForCausalLM": Model, "AutoTokenizer": Tokenizer}
    exec(padded, names)
    assert names["probe"].waad.shape == names["probe"].fai.shape == (2, 9)
    assert not names["probe"].waad[0, :3].any()
    exec(packed, names)
    assert names["probe"].waad.shape == (1, 17)
    assert not names["probe"].waad[0, [0, 5, 14]].any()  # the first token of a sequence sees itself alone
    losses = []
    names["batches"] = [
        {"input_ids": models.tokens(2, length, seed=length), "response_mask": torch.ones(2, length).bool()}
        for length in (9, 12, 20)
    ]
    names["my_loss"] = lambda output, waad, fai: (losses.append(waad.shape), output.logits.float().mean())[1]
    groups = names["probe"].groups
    exec(loop.replace("100 == 99", "2 == 1"), names)
    assert losses == [(2, 9), (2, 12), (2, 20)]
    assert names["probe"].groups is not groups
    exec(rhythm, names)
    with torch.no_grad(), RhythmProbe(names["model"], groups) as probe:
        names["model"](models.tokens(2, 15))
    assert set(probe.lse_source.values()) == {"rhythm attention"}
