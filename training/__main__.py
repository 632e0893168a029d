"""`python -m training train RECIPE [section.key=value ...]`, `evaluate RUN or RECIPE`, `compare RUN RUN ...`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from pathlib import Path

from .open_run import RunError
from .recipe import RecipeError, load_recipe

EPILOGUE = """examples:
  python -m training train training/recipes/countdown_tiny.yaml
  python -m training train training/recipes/dapo_4b_1k.yaml --dry-run
  python -m training train --resume runs/demo
  python -m training train training/recipes/countdown_tiny.yaml rhythm.mode=uniform output.path=runs/plain
  python -m training evaluate runs/demo eval.split=validation
  python -m training evaluate training/recipes/countdown_tiny.yaml eval.samples=8
  python -m training evaluate --model Qwen/Qwen3-0.6B --task my_tasks:Puzzles eval.size=null model.dtype=bfloat16
  python -m training compare runs/plain runs/demo
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 2 for a mistake, a missing package or a file that cannot be read or written; 130 for Ctrl-C.
        2 and 130 print one line. Any other error is a fault of this program and comes with its traceback.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="GRPO with rhythm credit: train, evaluate, compare.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="carry out a recipe; leaves metrics, model and report in its folder")
    train.add_argument(
        "recipe",
        nargs="?",
        help="a YAML file, for example training/recipes/countdown_tiny.yaml; an unfinished run of it goes on",
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file's")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe end to end in under two minutes, without a GPU, with stand-ins for what is not here",
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in a folder, whatever its recipe")
    train.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew; the run that is there goes once this one has finished",
    )
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the accuracy of a run's final model, of a recipe's first one, or of any model on any task",
        description="What was cut off goes on where it was, by the same command.",
    )
    evaluate.add_argument(
        "words",
        nargs="*",
        metavar="RUN or RECIPE, and section.key=value",
        help="a folder that `train` left, or a YAML file; then settings, for example eval.split=validation",
    )
    evaluate.add_argument("--model", help="in place of a run or a recipe: a folder, or a name of the hub")
    evaluate.add_argument("--task", help="its task: one of training/tasks, or module:Class")
    evaluate.add_argument(
        "--output", type=Path, help="a folder; default: the run's, otherwise runs/evaluate/TASK-MODEL"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="remove another evaluation that is there")
    compare = commands.add_parser("compare", help="a table and a page of several runs")
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders that `train` left; the first is the base"
    )
    compare.add_argument("--output", type=Path, default=Path("runs/compare.html"), help="default: %(default)s")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "compare":  # argparse takes words before the first option, and not those after it
        (options.overrides if options.command == "train" else options.words).extend(
            word for word in rest if not word.startswith("-")
        )
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    words: list[str] = []
    if options.command == "train":
        words = options.overrides
        if options.resume is not None:
            if options.overwrite or options.dry_run:
                parser.error("--resume goes on with a run: neither --overwrite nor --dry-run")
            words = [*([options.recipe] if options.recipe else []), *words]
        elif options.recipe is None:
            parser.error("train needs a RECIPE, or --resume RUN")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± must not fail a run that is done
    try:
        _quiet()
        if options.command == "train" and options.dry_run:
            from .dry_run.command import dry_run

            print(dry_run(options.recipe, words))
        elif options.command == "train":
            from .start import resumed
            from .train import run

            recipe = resumed(options.resume, words) if options.resume else load_recipe(options.recipe, words)
            run(recipe, overwrite=options.overwrite)
        elif options.command == "evaluate":
            from .evaluation.command import carry_out, subject

            named = subject(options.words, options.model, options.task, options.output)
            carry_out(named, options.overwrite)
        else:
            from .pages.compare import compare_runs

            compare_runs(options.runs, options.output)
    except (RecipeError, RunError, OSError, UnicodeError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # libraries write paragraphs
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted; {str(interrupt) or 'nothing was changed'}", file=sys.stderr)
        return 130
    return 0


def _quiet() -> None:
    """Keep the libraries' progress bars and their notices about renamed options off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
