"""What a dry run trains in place of a recipe's model: that model if it is small, else a random one of its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..models import load, place
from ..recipe import Recipe, RecipeError
from ..row_files import unreachable
from ..stand_in import causal_class, class_of, random_model, small_config, stand_in

SMALL = 64 * 2**20  # bytes of weights, up to which a model is used itself


@dataclass
class Findings:
    """Lines for the list at the end, each under a word that says what it is about."""

    checked: list[tuple[str, str]] = field(default_factory=list)
    unchecked: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [("Checked:", self.checked), ("Not checked:", self.unchecked)]
        return "\n".join(
            "\n".join([title, *(f"  {about:12} {indent(said, ' ' * 15).strip()}" for about, said in lines)])
            for title, lines in parts
        )


@dataclass
class TrialModel:
    """What is trained in place of a recipe's model.

    Attributes:
        path: of the model that is trained; None: the recipe's own random one.
        config: of the recipe's model, where it is known.
        is_real: whether the recipe's own model is trained.
        reads: whether the tokenizer is the recipe's own.
        name: of what stands in, in words.
        attention: what computes attention.
    """

    path: str | None
    tokenizer: Any
    config: Any
    is_real: bool
    reads: bool
    name: str
    attention: str


def trial_model(recipe: Recipe, scratch: Path, found: Findings) -> TrialModel:
    """What to train: the recipe's own model if it is small, else a random one of its class, saved in `scratch`."""
    source, wanted = place(recipe), recipe.model.attn_implementation
    attention = "sdpa" if "flash" in wanted or "/" in wanted else wanted
    if source is None:
        model, tokenizer = load(recipe)
        return TrialModel(None, tokenizer, model.config, True, True, "", attention)
    here, small = Path(source).is_dir(), False
    if here:
        weights = [path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".bin")]
        small = bool(weights) and sum(path.stat().st_size for path in weights) <= SMALL
    silent = "" if here else unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", local_files_only=bool(silent))
        config = AutoConfig.from_pretrained(source, local_files_only=bool(silent))
    except Exception as error:  # of any kind: what the libraries raise over files that are no model's has no one type
        if here or not silent:
            raise RecipeError(f"model: {source} cannot be loaded: {error}") from error
        tokenizer, config = None, None
    if small:
        return TrialModel(source, tokenizer, config, True, True, "", attention)

    named = recipe.model.architecture
    if config is None and named is None:
        raise RecipeError(
            f"model.architecture must name a class of transformers for a dry run, such as Qwen3ForCausalLM, got None: "
            f"{source} cannot be reached: {silent}"
        )
    if config is None:
        made, tokenizer = stand_in(str(named))
        why = f"{source} cannot be reached ({silent})"
    else:
        kind = class_of(config)
        if named is not None and causal_class(named) is not kind:
            raise RecipeError(f"model.architecture must be {kind.__name__}, the class of {source}, got {named!r}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        made = random_model(kind, small_config(config, len(tokenizer), known=True), tokenizer)
        why = f"those of {source} are not read"
    if attention == "sdpa" != wanted and not getattr(made, "_supports_sdpa", True):
        attention = "eager"
    count = sum(p.numel() for p in made.parameters())
    name = f"a random {type(made).__name__} of {count / 1e6:.2g}M parameters"
    found.unchecked.append(("weights", f"{why}; stood in: {name}"))
    if config is None:
        found.unchecked.append(("tokenizer", "prompts' lengths, the chat template; stood in: a token a byte"))
    layers = recipe.rhythm.layers
    if not isinstance(layers, str):
        total = getattr(config and config.get_text_config(decoder=True), "num_hidden_layers", None)
        if total is not None and any(layer >= total for layer in layers):
            raise RecipeError(f"rhythm.layers must be below {total}, the layers of {source}, got {list(layers)}")
        found.unchecked.append(("layers", f"{list(layers)}; stood in: middle5 of the small model"))
    if recipe.rhythm.groups is not None:
        found.unchecked.append(("heads", f"that the model has those of {recipe.rhythm.groups}; stood in: its own"))
    folder = scratch / "model"
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TrialModel(str(folder), tokenizer, config, False, config is not None, name, attention)
