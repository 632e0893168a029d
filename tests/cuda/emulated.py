"""Builds CUDA sources for the CPU (`emulation/emulation.h`) and calls their `extern "C"` functions by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "emulation"
KERNELS = ROOT / "csrc" / "cuda"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
# -ffp-contract=off: a test that compares bits decides itself where products are fused (fmaf).
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-DRHYTHM_EMULATE", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
# Set in the processes that `sanitized_environment` is for.
SANITIZED = "RHYTHM_TEST_SANITIZED" in os.environ
SANITIZE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class KernelError(RuntimeError):
    """A launch that the emulation refused: a barrier or shuffle that cannot be right."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def build(sources: Sequence[Path], *, sanitize: bool = False) -> Path:
    """Compile `sources` (.cu) and the emulation into one shared library, kept under a temporary folder by content."""
    flags = [*FLAGS, *(SANITIZE if sanitize else ["-O2"])]
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}", f"-I{EMULATION}"]
    read = [*sources, *sorted(EMULATION.iterdir()), *sorted(KERNELS.glob("*.*h"))]
    read += sorted((ROOT / "csrc" / "include").rglob("*.h"))
    digest = hashlib.sha256(repr((compiler(), flags)).encode())
    for path in read:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"rhythm-kernels-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:20]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*compiler(), *flags, *includes, "-x", "c++", "-include", str(EMULATION / "emulation.h")]
        command += [*map(str, sources), str(EMULATION / "emulation.cpp"), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        unfinished.rename(library)
    return library


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python process that loads libraries built with `sanitize`."""

    def runtime(name: str) -> str:
        return subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    # libstdc++ goes along: without it every C++ exception would abort. Python's own allocator would hide small arrays.
    return {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "RHYTHM_TEST_SANITIZED": "1",
    }


class Emulated:
    """A built library. `call` runs one of its launchers and raises what the emulation found wrong."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_error.restype = ctypes.c_char_p

    def set_order(self, order: str, seed: int = 0) -> None:
        """In which order a block's threads, and the blocks, run: `forward`, `reverse` or `shuffled` by `seed`."""
        self.library.emulation_set_order(ORDERS[order], seed)

    def call(self, name: str, *arguments: object) -> None:
        if getattr(self.library, name)(*arguments):
            raise KernelError(self.library.emulation_error().decode())
