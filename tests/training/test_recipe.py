"""Recipes: what the files hold, overrides, and errors that help."""

from __future__ import annotations

import pytest
import yaml

from rhythm_kernels import RhythmSettings
from training.recipe import ROOT, RecipeError, load_recipe, parse_recipe

from .runs import TINY


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_reads_and_survives_a_round_trip(path):
    recipe = load_recipe(path)
    assert parse_recipe(recipe.to_dict()) == recipe
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_makes_a_trainer_configuration(path, tmp_path):
    from training.grpo import trainer_config

    recipe = load_recipe(path, [f"output.path={tmp_path}"])
    # The paper's settings are the defaults; the tiny recipe's share was tuned on its own validation split, and
    # responses of a dozen tokens have no token ten after another
    others = {"countdown_tiny": {"top": 0.2}, "reasoning_gym_tiny": {"horizon": (1, 12)}}
    assert recipe.rhythm == RhythmSettings(**others.get(path.stem, {}))
    config = trainer_config(recipe)
    assert config.max_steps == recipe.grpo.max_steps
    assert config.rhythm_gamma_amp == recipe.rhythm.gamma_amp
    assert (config.rhythm_horizon, config.rhythm_sign) == (recipe.rhythm.horizon, "both")
    assert config.reward_weights == [1.0] * len(recipe.grpo.rewards) + [0.0]


def test_overrides():
    changed = ["grpo.max_steps=2", "grpo.learning_rate=1e-3", "rhythm.horizon=[4, 20]", "rhythm.layers=all"]
    recipe = load_recipe(TINY, [*changed, "grpo.gradient_checkpointing=true", "rhythm.groups=null"])
    assert recipe.grpo.max_steps == 2
    assert recipe.grpo.learning_rate == 1e-3
    assert recipe.rhythm.horizon == (4, 20)
    assert recipe.rhythm.layers == "all"
    assert recipe.rhythm.groups is None
    assert recipe.grpo.more["gradient_checkpointing"] is True


def test_an_open_horizon_and_one_sign(tmp_path):
    """Written as they are typed, read back from a run's folder, and handed to the trainer."""
    from training.grpo import trainer_config

    changed = ["rhythm.horizon=[10, null]", "rhythm.sign=positive", f"output.path={tmp_path}"]
    recipe = parse_recipe(yaml.safe_load(yaml.safe_dump(load_recipe(TINY, changed).to_dict())))
    config = trainer_config(recipe)
    assert (config.rhythm_horizon, config.rhythm_sign) == ((10, None), "positive")
    with pytest.raises(RecipeError, match=r"rhythm\.sign must be one of both, positive, negative, got 'plus'"):
        load_recipe(TINY, ["rhythm.sign=plus"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.max_step=2", "'max_step' is not a key of grpo; did you mean max_steps"),
        ("rythm.mode=local", "'rythm' is not a section; did you mean rhythm?"),
        ("rhythm.mod=local", "did you mean mode?"),
        ("eval.zzz=1", "'zzz' is not a key of eval; known: batch_size, max_tokens, samples, seed"),
        ("grpo.output_dir=x", "grpo.output_dir must not be set, got 'x': the folder of a run is output.path"),
        ("max_steps=2", "an override must be section.key=value, got 'max_steps=2'"),
        ("grpo.max_steps", "an override must be section.key=value"),
        ("grpo.max_steps=two", "grpo.max_steps must be a whole number, got 'two'"),
        ("rhythm.mode=3", "rhythm.mode must be one of local, global, coupled, random, entropy, uniform, got 3"),
        ("task.numbers=3", "task.numbers must be a list, each entry a whole number, got 3"),
        ("task.numbers=[3, x]", "task.numbers must be a list, each entry a whole number, got [3, 'x']"),
        ("rhythm.horizon=[null, 10]", "a whole number or null, got [None, 10]"),
        ("rhythm.layers=1.5", "rhythm.layers must be a word or a list, each entry a whole number, got 1.5"),
        ("task.numbers=[", "task.numbers must be YAML, got '['"),
        ("eval.split=tset", "eval.split must be one of train, validation, test, got 'tset'"),
        ("grpo.optimizer=lion", "grpo.optimizer must be one of adamw, sgd, got 'lion'"),
    ],
)
def test_wrong_overrides_are_explained(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(TINY, [override])
    assert message in str(caught.value)


def test_wrong_files_are_explained(tmp_path):
    with pytest.raises(RecipeError, match=r"recipes here: .*countdown_tiny\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="a recipe must be a mapping with the sections task, model, grpo"):
        load_recipe(path)
    path.write_text("grpo: [\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)
    path.write_text("grpo: 3\n")
    with pytest.raises(RecipeError, match="grpo must be a mapping of settings, got 3"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="grpo must be a mapping of settings, got 3"):
        load_recipe(path, ["grpo.max_steps=3"])


def test_a_model_must_be_named(tmp_path):
    """Nothing stands in for a section model that was forgotten, least of all a model of another task."""
    path = tmp_path / "recipe.yaml"
    path.write_text("task: {name: countdown}\n")
    with pytest.raises(RecipeError, match=r"model\.path must be given: a folder, a name on the hub, or null"):
        load_recipe(path)
    assert load_recipe(path, ["model.path=null"]).model.path is None
