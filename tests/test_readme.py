"""The training loop of the README does what it says, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rhythm_kernels import HeadGroups

from .probe.probe_models import padded_batch, tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOOP, PARTS = re.findall(r"```python\n(.*?)```", README.split("## In your own training loop")[1], re.DOTALL)[:2]


@pytest.fixture
def given(monkeypatch):
    """What the README's reader has: a model, batches with the mask of their responses, advantages and a log."""
    model = tiny_model("qwen3")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    batch = padded_batch()
    response_mask = batch["attention_mask"].bool() & (torch.arange(72) >= 20)
    logged = []
    return {
        "batches": [{**batch, "response_mask": response_mask} for _ in range(2)],
        "group_advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "log": logged.append,
        "logged": logged,
        "model": model,
        "response_mask": response_mask,
        **batch,
    }


def test_the_loop_shapes_advantages(given):
    exec(LOOP, given)
    assert len(given["logged"]) == 2
    assert all(1 < line["gamma_mean"] < 1.5 for line in given["logged"])
    shaped = given["advantages"]
    assert shaped.shape == (4, 72)
    assert torch.equal(shaped[:, :20], given["group_advantages"][:, None].expand(4, 20))
    assert torch.equal(shaped, given["credit"].shape(given["group_advantages"]))


def test_the_parts_alone_give_the_same(given):
    exec(LOOP, given)
    whole, groups = given["advantages"], given["credit"].groups
    calibration_batch = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    calibration_batch["response_mask"] = given["response_mask"]
    given |= {"calibration_batch": calibration_batch, "advantages": given["group_advantages"]}
    exec(PARTS, given)
    assert given["groups"] == groups
    assert isinstance(groups, HeadGroups)
    assert torch.equal(given["advantages"], whole)
