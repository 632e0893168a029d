"""`python -m training train RECIPE [section.key=value ...]`, `evaluate RUN`, `compare RUN RUN ...`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from pathlib import Path

from .folder import RunError
from .recipe import RecipeError, load_recipe

EPILOGUE = """examples:
  python -m training train training/recipes/countdown_tiny.yaml
  python -m training train training/recipes/dapo_4b_1k.yaml --dry-run
  python -m training train training/recipes/countdown_tiny.yaml rhythm.mode=uniform output.path=runs/plain
  python -m training evaluate runs/demo eval.split=validation
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
    train.add_argument("recipe", help="a YAML file, for example training/recipes/countdown_tiny.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file's")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe end to end in under two minutes, without a GPU, with stand-ins for what is not here",
    )
    evaluate = commands.add_parser("evaluate", help="measure the accuracy of a run's final model again")
    evaluate.add_argument("run", type=Path, help="a folder that `train` left")
    evaluate.add_argument("overrides", nargs="*", metavar="eval.key=value", help="for example eval.split=validation")
    compare = commands.add_parser("compare", help="a table and a page of several runs")
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders that `train` left; the first is the base"
    )
    compare.add_argument("--output", type=Path, default=Path("runs/compare.html"), help="default: %(default)s")
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.command != "train" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "train":
        options.overrides += rest  # argparse takes none that follow --dry-run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± must not fail a run that is done
    try:
        _quiet()
        if options.command == "train" and options.dry_run:
            from .dry_run import dry_run

            print(dry_run(options.recipe, options.overrides))
        elif options.command == "train":
            from .train import run

            run(load_recipe(options.recipe, options.overrides))
        elif options.command == "evaluate":
            from .evaluate_run import evaluate_run

            evaluate_run(options.run, options.overrides)
        else:
            from .compare import compare_runs

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
