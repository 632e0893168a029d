"""What a machine without a network needs beside the tree: wheels, the commit's name, kernels compiled ahead of time.

`collect` fills `.carry` on a machine with a network and nvcc; `unpack` puts its contents to use where the calls run.
The extension `rhythm_kernels/_C.abi3.so`, which is built with its CUDA part anywhere, travels beside it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from ..machine import commit
from .steps import ROOT

FOLDER = ROOT / ".carry"
_WHEELS, _COMMIT, _CACHE = FOLDER / "wheels", FOLDER / "commit", FOLDER / "triton-cache.tar.xz"
EXTENSION = ROOT / "rhythm_kernels" / "_C.abi3.so"
MOST = 64 * 2**20  # bytes of all that is carried
# What the machine's own Python lacks; the rest of what these need is there (numpy, pandas, pyarrow, transformers, ...).
PACKAGES = ("trl==1.16.0", "datasets<5", "dill<0.4.2", "multiprocess<0.70.20", "flash-colreduce==0.2.2")
PYTHON, TRITON = "3.12", "3.6.0"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Outside of the tree, so that nothing of it travels back or is linted; the same on both machines whatever TMPDIR says,
# since Triton's cache holds absolute paths.
_UNPACKED = Path("/tmp/rhythm-kernels-carried")


def triton_cache() -> Path:
    """Where compiled Triton kernels are kept, on both machines."""
    return _UNPACKED / "triton"


def compiled() -> int:
    """How many kernels the cache holds."""
    return sum(1 for _ in triton_cache().glob("*/*.cubin"))


def collect(compile_kernels: bool) -> int:
    """Fill `.carry`; returns the exit status."""
    import rhythm_kernels as rk

    if compile_kernels:
        import triton

        here = platform.python_version().rpartition(".")[0], triton.__version__
        if here != (PYTHON, TRITON):
            print(
                f"the Python and Triton of --compile must be {PYTHON} and {TRITON}, got {here[0]} and {here[1]}: "
                "the other machine would not find the kernels"
            )
            return 1
    cuda = rk.build_info().get("cuda", {})
    if not EXTENSION.exists() or not cuda.get("built"):
        print(f"{EXTENSION} has no CUDA part: build it where nvcc is: python setup.py build_ext --inplace")
        return 1
    shutil.rmtree(_WHEELS, ignore_errors=True)  # of another time: two versions of one package stop the installation
    _WHEELS.mkdir(parents=True)
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(_WHEELS), *PACKAGES]
    if subprocess.run(command).returncode:
        return 1
    _COMMIT.write_text(commit() + "\n", encoding="utf-8")
    if compile_kernels:
        from tests.triton import carried_kernels

        carried_kernels.compile_all(triton_cache())
        with tarfile.open(_CACHE, "w:xz") as archive:
            archive.add(triton_cache(), arcname="triton")
    files = [EXTENSION, *(path for path in FOLDER.rglob("*") if path.is_file())]
    total = sum(path.stat().st_size for path in files)
    for path in files:
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(ROOT)}")
    print(f"{total / 2**20:7.2f} MiB in all, beside the tree (at most {MOST / 2**20:.0f} MiB together)")
    return 0 if total < MOST else 1


def unpack() -> None:
    """Put what was carried onto the paths of the processes that follow; nothing where nothing was carried."""
    if not FOLDER.exists():
        return
    site = _UNPACKED / "site"
    wheels = sorted(_WHEELS.glob("*.whl"))
    if wheels and not site.exists():
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
        if subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]).returncode:
            print("the carried wheels were not installed: what needs them will say so", flush=True)
    if site.exists():
        os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{site}"
    if _COMMIT.exists():
        os.environ["RHYTHM_COMMIT"] = _COMMIT.read_text(encoding="utf-8").strip()
    if _CACHE.exists():
        if not triton_cache().exists():
            with tarfile.open(_CACHE) as archive:
                archive.extractall(_UNPACKED, filter="data")
        os.environ["TRITON_CACHE_DIR"] = str(triton_cache())
