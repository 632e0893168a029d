"""The recipes that come with the repository: those of the paper state its setting, and say where each value is from."""

from __future__ import annotations

import pytest
import yaml

from rhythm_kernels import RhythmSettings
from training.models import load
from training.recipe import ROOT, load_recipe
from training.stand_in import causal_class
from training.task import asked, make

PATHS = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
PAPER = [path for path in PATHS if not path.stem.endswith("_tiny")]
NAMES = {
    *("qwen3_0.6b_gsm8k", "countdown_4b", "dapo_4b_1k", "dapo_4b_8k", "dapo_8b_1k", "dapo_8b_8k", "zebralogic_4b"),
    *("crossthink_8b", "countdown_tiny", "maths_tiny", "multiple_choice_tiny", "reasoning_gym_tiny"),
    "long_context_tiny",
}


def test_the_rows_of_the_paper_and_a_tiny_one_for_each_kind_of_task():
    assert {path.stem for path in PATHS} >= NAMES
    tiny = {load_recipe(path).task.name for path in PATHS if path not in PAPER}
    assert tiny == {"countdown", "maths", "multiple_choice", "reasoning_gym", "recall"}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_setting(path):
    """Batches of 512 responses, 32 a gradient step, a learning rate of 1e-6, no KL term, and the method's values."""
    recipe = load_recipe(path)
    grpo = recipe.grpo
    assert grpo.per_device_train_batch_size * grpo.steps_per_generation == 512
    assert grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps == 32
    assert (grpo.learning_rate, grpo.beta, grpo.temperature, grpo.loss_type) == (1e-6, 0.0, 1.0, "grpo")
    assert grpo.max_completion_length == (8192 if path.stem.endswith("_8k") else 1024)
    assert recipe.rhythm == RhythmSettings()
    assert (recipe.model.dtype, grpo.more["bf16"]) == ("float32", True)  # weights that can take steps of 1e-6
    assert causal_class(recipe.model.architecture).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_value_of_a_papers_recipe_says_where_it_is_from(path):
    text = path.read_text(encoding="utf-8")
    sections = yaml.safe_load(text)
    known = {"name", "seed", "architecture", "batch_size"}  # what to run is no choice of values
    for section in ("grpo", "rhythm", "eval"):
        block = text.split(f"\n{section}:\n")[1].split("\n\n")[0].splitlines()
        lines = {line.split(":")[0].strip(): line for line in block}
        for key in sections[section].keys() - known - {"split"}:
            assert "#" in lines[key], f"{section}.{key}"
    assert "Every value is ours" not in text


@pytest.mark.parametrize("path", [path for path in PATHS if path not in PAPER], ids=lambda path: path.stem)
def test_a_tiny_recipe_says_so(path):
    text = path.read_text(encoding="utf-8")
    assert "two CPU cores" in text.splitlines()[0]
    assert load_recipe(path).model.dtype == "float32"


def test_neither_of_the_papers_ways_has_room_for_a_row_of_the_long_one():
    """What the recipe's comments say is what its model and its prompts come to."""
    path = ROOT / "training" / "recipes" / "long_context_tiny.yaml"
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    model, tokenizer = load(recipe)
    task = make(recipe.task)
    prompts = asked(task, task.instances("train", 8), tokenizer)
    (length,) = {len(prompt.tokens) for prompt in prompts}
    tokens = length + recipe.grpo.max_completion_length
    assert recipe.grpo.more["generation_kwargs"] == {"min_new_tokens": recipe.grpo.max_completion_length}
    assert f"Rows of {tokens:,} tokens" in text and f"a prompt of {length:,} tokens" in text
    config = model.config
    map_bytes = config.num_attention_heads * tokens**2 * 4
    all_maps, by_layer = config.num_hidden_layers * map_bytes, 2 * map_bytes + 4 * tokens**2
    assert f"{all_maps / 1e9:.0f} GB" in text and f"{by_layer / 1e9:.0f} GB" in text
    assert min(all_maps, by_layer) > 23 * 2**30
    assert tokens <= config.max_position_embeddings
