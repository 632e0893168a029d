"""The package installs anywhere: with or without a compiler, without torch in the build, from a wheel and an sdist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TORCH_FOLDER = Path(torch.__file__).parents[1]
SENTENCE = "pip install --no-build-isolation ."
NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else None)
SELF_CHECK = Path(__file__).with_name("self_check.py")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command with nothing of this checkout on its path; its output, or a failure that shows it."""
    ours = ("PYTHONPATH", "CC", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "RHYTHM_CUDA", "RHYTHM_CUDA_ARCHS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout[-30000:]}")
    return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is tracked or will be, without anything built."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def build_wheel(source: Path, **variables: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    folder = source.parent / "wheels"
    command = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    said = run(sys.executable, "-c", command, folder, cwd=source, **{"RHYTHM_CUDA": "0"} | variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def install_and_check(wheel: Path) -> dict[str, Any]:
    """Install into an empty environment that sees torch, compare with the dense definitions; what the check found."""
    home = wheel.parents[1] / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "torch.pth").write_text(f"{TORCH_FOLDER}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    run(*pip, wheel, cwd=home)
    return json.loads(run(python, SELF_CHECK, cwd=home).splitlines()[-1])


def test_wheel(source: Path) -> None:
    """With the CUDA kernels where nvcc is: the same wheel, on a torch that may not know CUDA."""
    wheel, said = build_wheel(source, RHYTHM_CUDA="")
    assert "-cp310-abi3-" in wheel.name
    assert SENTENCE not in said
    found = install_and_check(wheel)
    assert found["backends"]["cpu"] == ""
    assert found["built"]["cuda"]["built"] == (NVCC is not None)


def test_sdist(source: Path) -> None:
    before = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    command = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", command, source.parent / "sdist", cwd=source)
    (archive,) = (source.parent / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(source.parent / "unpacked", filter="data")
    (unpacked,) = (source.parent / "unpacked").iterdir()
    missing = {name for name in before if not (unpacked / name).is_file()}
    assert missing <= {".gitignore"}
    wheel, _ = build_wheel(unpacked, CXXFLAGS="-O0")  # not optimised: it is built for what it holds
    assert install_and_check(wheel)["backends"]["cpu"] == ""
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" not in name]
    assert all(re.fullmatch(r"rhythm_kernels/([\w/]+\.py|py\.typed|_C\.abi3\.so)", name) for name in names), names


@pytest.mark.parametrize("variables", [{"CC": "/bin/false", "CXX": "/bin/false"}, {"CXX": "/no/such/compiler"}])
def test_without_a_compiler(source: Path, variables: dict[str, str]) -> None:
    wheel, said = build_wheel(source, **variables)
    assert wheel.name.endswith("py3-none-any.whl")
    assert said.count(SENTENCE) == 1
    assert "cannot build a three-line program" in said
    assert SENTENCE in install_and_check(wheel)["backends"]["cpu"]  # and the backend says the same when it is asked for


def test_without_torch_in_the_build(source: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    wheel, said = build_wheel(source, PYTHONPATH=str(hidden))
    assert wheel.name.endswith("py3-none-any.whl")
    assert said.count(SENTENCE) == 1
    assert "torch is not installed in the build environment" in said


def test_an_old_setuptools_is_told(source: Path) -> None:
    """As a new environment of Python 3.11 has it, and pip without build isolation takes it."""
    command = "import setuptools; setuptools.__version__ = '65.5.0'; import setuptools.build_meta as b"
    with pytest.raises(AssertionError, match=r"setuptools 65\.5\.0 is too old to build it: run `pip install 'setup"):
        run(sys.executable, "-c", f"{command}; b.build_wheel('wheels')", cwd=source)


def test_elsewhere_than_on_linux(source: Path) -> None:
    command = "import setuptools.build_meta as b, sys; sys.platform = 'darwin'; b.build_wheel('wheels')"
    said = run(sys.executable, "-c", command, cwd=source)
    assert "because they are built on Linux, not on darwin" in said
    assert SENTENCE not in said
    assert [wheel.name.split("-", 2)[2] for wheel in (source / "wheels").iterdir()] == ["py3-none-any.whl"]


def test_an_error_of_ours_is_an_error(source: Path) -> None:
    with (source / "csrc" / "cpu" / "band_rows.cpp").open("a") as file:
        file.write("#error broken\n")
    with pytest.raises(AssertionError, match=r"band_rows\.cpp does not compile"):
        build_wheel(source)


@pytest.fixture
def old_nvcc(tmp_path: Path) -> Path:
    """A folder with an nvcc of CUDA 12.4 that compiles everything to nothing."""
    folder = tmp_path / "cuda" / "bin"
    folder.mkdir(parents=True)
    run("ar", "cr", folder / "libcudart_static.a", cwd=folder)
    script = folder / "nvcc"
    script.write_text(f"""#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_86\\ncompute_90\\n' ;;
  *--dryrun*) echo '#$ LIBRARIES= "-L{folder}"' ;;
  *compute_100*|*"${{NVCC_REFUSES:-nothing at all}}"*) exit 1 ;;
  *) for last; do :; done; exec c++ -x c++ -c /dev/null -o "$last" ;;
esac
""")
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RHYTHM_CUDA_ARCHS": "100"}, r"RHYTHM_CUDA_ARCHS must be among \[80, 86, 90\] for .*nvcc, got '100'"),
        ({"RHYTHM_CUDA_ARCHS": "8.0"}, r"RHYTHM_CUDA_ARCHS must be like 80;90a;100\+PTX, got '8.0'"),
        ({"RHYTHM_CUDA_ARCHS": "75"}, "RHYTHM_CUDA_ARCHS must be 80 or later, got '75'"),
        ({"RHYTHM_CUDA_ARCHS": " ; "}, "RHYTHM_CUDA_ARCHS must name a compute capability, got ' ; '"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a number of at least 1 or unset, got '0'"),
        (
            {"CXX": "/bin/false"},
            "RHYTHM_CUDA=1, but no compiled kernels can be built: the compiler `/bin/false` cannot",
        ),
        ({"RHYTHM_CUDA": "yes"}, "RHYTHM_CUDA must be 0, 1 or unset, got 'yes'"),
        (
            {"CUDA_HOME": "/no/such/cuda"},
            "cannot be built: no nvcc was found in CUDA_HOME=/no/such/cuda",
        ),
        ({"NVCC_REFUSES": "probe.cu"}, "cannot be built: .* cannot build a three-line program"),
        (  # a default architecture that nvcc is too old for is left out, not an error
            {"NVCC_REFUSES": "credit.cu"},
            r"too old for compute capability 100: left out(?s:.*)csrc/cuda/credit\.cu does not compile for 80;90a\n",
        ),
    ],
)
def test_what_cannot_be_built_for_cuda_is_told(
    source: Path, old_nvcc: Path, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        build_wheel(source, **{"RHYTHM_CUDA": "1", "CUDA_HOME": str(old_nvcc.parent), "CXXFLAGS": "-O0"} | variables)


def test_what_did_not_change_is_not_compiled_again(source: Path, old_nvcc: Path) -> None:
    variables = {"RHYTHM_CUDA": "1", "CUDA_HOME": str(old_nvcc.parent), "CXXFLAGS": "-O0"}

    def compiled(**more: str) -> None:
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **variables, **more)

    def linked() -> float:
        (library,) = source.glob("rhythm_kernels/_C*")
        return library.stat().st_mtime

    def times() -> dict[str, float]:
        return {path.name: path.stat().st_mtime for path in (source / "build").rglob("kernels/*.o")}

    compiled()
    first = times()
    assert {"credit.cuda.o", "band_rows.baseline.o"} <= set(first)
    compiled()
    assert times() == first
    # Other architectures, nothing else: compiled again, which this nvcc refuses.
    with pytest.raises(AssertionError, match=r"credit\.cu does not compile for 80\n"):
        compiled(RHYTHM_CUDA_ARCHS="80", NVCC_REFUSES="credit.cu")
    before = times()
    (source / "csrc" / "cuda" / "launch.h").touch()
    compiled()
    after = times()
    assert {name for name in after if after[name] != before.get(name)} == {
        f"{name}.cuda.o" for name in ("band_rows", "band_columns", "credit", "error")
    }
    before_that = linked()
    (source / "setup.py").touch()  # the flags, perhaps
    compiled()
    assert all(times()[name] > after[name] for name in after)
    assert linked() > before_that
