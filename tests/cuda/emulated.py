"""Builds CUDA sources for the CPU (`emulation/emulation.h`) and calls their `extern "C"` functions by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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


def _shared_variables(path: Path, library: ctypes.CDLL) -> Iterator[tuple[int, int]]:
    """Address and size of every static variable of a function, which is what `__shared__` makes here."""
    done = subprocess.run(["nm", "-S", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in done.stdout.splitlines()]
    known = next(int(symbol[0], 16) for symbol in symbols if symbol[-1] == "emulation_set_order")
    base = ctypes.cast(library.emulation_set_order, ctypes.c_void_p).value - known
    for symbol in symbols:
        # Not the constants of the standard library's own functions.
        if len(symbol) == 4 and symbol[2] in "bBdDuV" and re.match(r"_ZZ(?!NK?St)", symbol[3]):
            if symbol[2] in "bd":
                address = base + int(symbol[0], 16)
            else:  # of templates and inline functions: libraries may share one
                address = ctypes.addressof(ctypes.c_char.in_dll(library, symbol[3]))
            yield address, int(symbol[1], 16)


class Emulated:
    """A built library. `call` runs one of its launchers and raises what the emulation found wrong."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_error.restype = ctypes.c_char_p
        if not SANITIZED:  # where the bounds of variables are watched
            for address, size in _shared_variables(library, self.library):
                self.library.emulation_add_shared(ctypes.c_void_p(address), ctypes.c_size_t(size))

    def set_order(self, order: str, seed: int = 0) -> None:
        """In which order a block's threads, and the blocks, run: `forward`, `reverse` or `shuffled` by `seed`."""
        self.library.emulation_set_order(ORDERS[order], seed)

    def call(self, name: str, *arguments: object) -> None:
        if getattr(self.library, name)(*arguments):
            raise KernelError(self.library.emulation_error().decode())
