"""What nvcc makes of a kernel: registers, shared memory and spills of every instance, without a GPU.

``python -m tests.cuda.compiled`` prints them as a table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .emulated import KERNELS, ROOT

# 90a alone: plain -arch=sm_90a would make generic PTX as well.
ARCHITECTURES = ("80", "90a", "100")


class Usage(NamedTuple):
    """One instance of a kernel on one architecture; sizes in bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


COMPILE = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}")


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_kernels(source: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Usage]:
    """Compile one source for all architectures in one call, warnings being errors."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc()), *COMPILE, "-Xptxas", "-v", "-c"]
        command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall", "-Xcompiler", "-Wno-unused-function"]
        for architecture in architectures:
            command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        done = subprocess.run([*command, str(source), "-o", str(Path(folder, "out.o"))], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return list(_parse(done.stderr))


def _parse(text: str) -> list[Usage]:
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = []
    for entry in names.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(?:void )?(.*?)' for 'sm_(\w+)'", entry).groups()
        number = {
            key: int(match.group(1)) if (match := re.search(pattern, entry)) else 0
            for key, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("shared", r"(\d+) bytes smem"),
                ("stack", r"(\d+) bytes stack frame"),
                ("stores", r"(\d+) bytes spill stores"),
                ("loads", r"(\d+) bytes spill loads"),
            )
        }
        name = re.sub(r"\(anonymous namespace\)::|rhythm::|\(.*\)$", "", name)
        spilled = number["stores"] + number["loads"]
        found.append(Usage(name, architecture, number["registers"], number["shared"], number["stack"], spilled))
    return found


def tensor_core_kernels(source: Path) -> set[str]:
    """The kernels of a source whose PTX has `mma.sync`."""
    command = [str(nvcc()), *COMPILE, "-arch=compute_80", "-ptx", "-o", "-", str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"\.entry (?:void )?", text)[1:]
    names = (re.sub(r"\(anonymous namespace\)::|rhythm::", "", body.split("(rhythm::")[0]) for body in bodies)
    return {name for name, body in zip(names, bodies) if "mma.sync" in body}


def main() -> None:
    if nvcc() is None:
        sys.exit("there is no nvcc on the PATH")
    print("| kernel | sm | registers | shared | stack | spilled |\n| --- | --- | --- | --- | --- | --- |")
    for source in sorted(KERNELS.glob("*.cu")):
        for usage in compile_kernels(source):
            print("| " + " | ".join(map(str, usage)) + " |", flush=True)


if __name__ == "__main__":
    main()
