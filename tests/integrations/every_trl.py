"""A program: every TRL that pyproject.toml allows, held to `trl_contract` by its wheel, of which nothing is installed.

Run as `python -m tests.integrations.every_trl FOLDER`, where the wheels are kept. Prints a line a release: which of the
three overridden methods have another AST than in the release before, and how many rules hold; then those that do not.
Fails where one does not. Needs `pip` and `packaging`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .trl_contract import RULES, broken
from .trl_source import GENERATE, LOSS, PASS, Release

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ANY_PYTHON = "--ignore-requires-python"  # the newest TRL wants a newer Python than we do


def allowed(index: str, pyproject: Path = PYPROJECT) -> list[str]:
    """The releases that `pip index versions trl` names and the extra `train` allows, from the oldest."""
    said = re.search(r"Available versions: (.*)", index)
    if said is None:
        raise SystemExit(f"pip knows no version of trl: {index.strip()}")
    (wanted,) = re.findall(r'^\s*"trl([^"]*)"', pyproject.read_text(), re.MULTILINE)
    return [str(version) for version in sorted(SpecifierSet(wanted).filter(map(Version, said[1].split(", "))))]


def fetched(version: str, folder: Path) -> Path:
    """The wheel of a release, from `folder` where it is there."""
    wheel = folder / f"trl-{version}-py3-none-any.whl"
    if not wheel.exists():
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", ANY_PYTHON, "--dest", str(folder)]
        subprocess.run([*PIP, *words, f"trl=={version}"], check=True)
    return wheel


def report(wheels: Iterable[tuple[str, Path]]) -> int:
    """Print what was found; 1 where a rule does not hold, else 0."""
    names, faults = (GENERATE, LOSS, PASS), []
    before: dict[str, str] = {}
    print(f"{'TRL':<10}{'  '.join(names)}  rules")
    for version, wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            trainer, utils = (archive.read(f"trl/trainer/{x}.py").decode() for x in ("grpo_trainer", "utils"))
        trl = Release(trainer, utils)
        now = {name: trl.fingerprint(name) for name in names}
        columns = ["=" if before.get(name) == now[name] else now[name] for name in names]
        found = broken(trl)
        faults += [f"{version}: {words}" for words in found]
        held = f"{len(RULES) - len(found)} of {len(RULES)}"
        print(f"{version:<10}{'  '.join(x.ljust(len(name)) for x, name in zip(columns, names))}  {held}")
        before = now
    print("\n".join(faults) or "every rule holds in every release")
    return int(bool(faults))


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    asked = [*PIP, "index", "versions", "trl", ANY_PYTHON]
    index = subprocess.run(asked, capture_output=True, text=True)
    return report((version, fetched(version, folder)) for version in allowed(index.stdout or index.stderr))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
