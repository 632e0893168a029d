"""LoRA: what is trained is the adapter, what is saved is a model like any other, and a run goes on with its adapter."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from training.__main__ import main
from training.lora import Lora, merged
from training.models import load
from training.recipe import load_recipe
from training.sharding import made_whole

from .runs import FEW, TINY, save_model


@pytest.fixture
def recipe(tmp_path):
    save_model(tmp_path / "model", 16, 2, 2)
    return load_recipe(
        TINY, [f"model.path={tmp_path / 'model'}", "model.lora={r: 2, target_modules: [q_proj, v_proj]}"]
    )


def test_gathered_weights_become_a_whole_model(recipe):
    """As of a model that was divided: names and weights of the adapter beside those of the model."""
    model, _ = load(recipe)
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    adapted = get_peft_model(model, recipe.model.lora.config())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = adapted(tokens).logits
    whole = made_whole(recipe, adapted.state_dict())
    torch.testing.assert_close(whole(tokens).logits, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    assert whole.state_dict().keys() == load(recipe)[0].state_dict().keys()
    torch.testing.assert_close(merged(adapted)(tokens).logits, expected, rtol=0, atol=1e-5)


def test_settings_are_those_of_peft(recipe):
    config = Lora(r=4, alpha=8.0, dropout=0.1).config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 8.0, 0.1, "all-linear")
    assert recipe.to_dict()["model"]["lora"] == {
        "r": 2,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "model.lora={r: 2}, grpo.beta=0.1, grpo.sync_ref_model=true",
            "`sync_ref_model=True` while using a PEFT model",
        ),
        ("model.lora={target_modules: [embed_tokens]}", "must not hold the embedding of this model: its weights are"),
    ],
)
def test_what_an_adapter_cannot_do_is_one_line(tmp_path, capsys, words, message):
    assert main(["train", TINY, *FEW, *words.split(", "), f"output.path={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_with_an_adapter(tmp_path, optimizer):
    """Only what the adapter is beside changes; in two parts it is the same run."""
    words = [
        TINY,
        *FEW,
        "model.lora={r: 4}",
        "grpo.max_steps=4",
        "grpo.learning_rate=0.1",
        f"grpo.optimizer={optimizer}",
    ]
    words += ["grpo.lr_scheduler_type=constant", "grpo.max_completion_length=32", "grpo.per_device_train_batch_size=16"]
    words += ["grpo.num_generations=8", "task.train_size=64"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *words, f"output.path={whole}"]) == 0
    for steps in (2, 4):
        assert main(["train", *words, f"output.path={parts}", f"grpo.max_steps={steps}"]) == 0
    first = load_file("training/checkpoints/countdown_tiny/model.safetensors")
    last, other = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed and all("_proj" in name for name in changed)
    assert all(torch.equal(last[name], other[name]) for name in last)
    assert main(["evaluate", str(whole), "eval.size=4", "--output", str(tmp_path / "again")]) == 0
