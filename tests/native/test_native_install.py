"""The package installs anywhere: with or without a compiler, without torch in the build, from a wheel and an sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TORCH_FOLDER = Path(torch.__file__).parents[1]
SENTENCE = "pip install --no-build-isolation ."
SELF_CHECK = """
import torch, rhythm_kernels as rk
from rhythm_kernels import reference
assert rk.__file__.startswith({prefix!r}), rk.__file__
q, k = torch.randn(2, 50, 4, 16), torch.randn(2, 50, 2, 16)
assert (rk.waad(q, k) - reference.waad(q.double(), k.double())).abs().max() < 1e-4
assert (rk.fai(q, k) - reference.fai(q.double(), k.double())).abs().max() < 1e-4
print("cpu:", rk.backends()["cpu"])
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command with nothing of this checkout on its path; its output, or a failure that shows it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX", "CXXFLAGS", "LDFLAGS")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is tracked or will be, without anything built."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("training/", "tests/")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def build_wheel(source: Path, **variables: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    folder = source.parent / "wheels"
    command = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    said = run(sys.executable, "-c", command, folder, cwd=source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def install_and_check(wheel: Path) -> str:
    """Install into an empty environment that sees torch, import, and compare with the dense definitions."""
    home = wheel.parents[1] / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "torch.pth").write_text(f"{TORCH_FOLDER}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    run(*pip, wheel, cwd=home)
    return run(python, "-c", SELF_CHECK.format(prefix=site), cwd=home)


def test_wheel(source: Path) -> None:
    wheel, said = build_wheel(source)
    assert "-cp310-abi3-" in wheel.name
    assert SENTENCE not in said
    assert install_and_check(wheel).strip() == "cpu:"


def test_sdist(source: Path) -> None:
    command = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", command, source.parent / "sdist", cwd=source)
    (archive,) = (source.parent / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(source.parent / "unpacked", filter="data")
    (unpacked,) = (source.parent / "unpacked").iterdir()
    ours = {str(path.relative_to(source)) for path in source.glob("csrc/**/*.*")}
    theirs = {str(path.relative_to(unpacked)) for path in unpacked.glob("csrc/**/*.*")}
    assert ours == theirs
    wheel, _ = build_wheel(unpacked)
    assert install_and_check(wheel).strip() == "cpu:"


@pytest.mark.parametrize("variables", [{"CC": "/bin/false", "CXX": "/bin/false"}, {"CXX": "/no/such/compiler"}])
def test_without_a_compiler(source: Path, variables: dict[str, str]) -> None:
    wheel, said = build_wheel(source, **variables)
    assert wheel.name.endswith("py3-none-any.whl")
    assert said.count(SENTENCE) == 1
    assert "cannot build a three-line program" in said
    assert SENTENCE in install_and_check(wheel)  # and the backend says the same when it is asked for


def test_without_torch_in_the_build(source: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    wheel, said = build_wheel(source, PYTHONPATH=str(hidden))
    assert wheel.name.endswith("py3-none-any.whl")
    assert said.count(SENTENCE) == 1
    assert "torch is not installed in the build environment" in said


def test_an_error_of_ours_is_an_error(source: Path) -> None:
    with (source / "csrc" / "cpu" / "band_rows.cpp").open("a") as file:
        file.write("#error broken\n")
    with pytest.raises(AssertionError, match=r"band_rows\.cpp does not compile"):
        build_wheel(source)
