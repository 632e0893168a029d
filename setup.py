"""Builds `rhythm_kernels._C`, the compiled CPU kernels; without torch or a C++ compiler, a pure Python package.

Everything else about the package is in pyproject.toml. Variables: CXX and CC (the compiler), MAX_JOBS (parallel
compilations), CXXFLAGS and LDFLAGS (added). Nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
PASSES = ("band_rows", "band_columns", "row_stats", "column_stats")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Each pass is compiled once for each capability; csrc/cpu/dispatch.cpp lists the same ones and picks at run time.
CAPABILITIES = {"baseline": (4, [])}
if X86:
    CAPABILITIES |= {
        "avx2": (8, AVX2),
        "avx2_wide": (16, AVX2),
        "avx512": (16, [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]),
    }
# TORCH_TARGET_VERSION: the oldest torch that the binary runs on, 2.10.
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-I{ROOT / 'csrc' / 'include'}"]
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-DRHYTHM_X86"] if X86 else [])]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def why_not() -> str:
    """Why the kernels cannot be built here, or ""."""
    try:
        import torch
    except ImportError:
        return "torch is not installed in the build environment"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    commands = [compiler(), *([shlex.split(os.environ["CC"])] if "CC" in os.environ else [])]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int one() {\n  return 1;\n}\n")
        for command in commands:
            arguments = [*command, "-shared", "-fPIC", str(source), "-o", str(Path(folder, "probe.so"))]
            try:
                built = subprocess.run(arguments, capture_output=True).returncode == 0
            except OSError:
                built = False
            if not built:
                return f"the compiler `{shlex.join(command)}` cannot build a three-line program"
    return ""


def native() -> dict:
    """The arguments of `setup` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": False})

        def build_extension(self, ext) -> None:
            objects = Path(self.build_temp, "kernels").resolve()
            objects.mkdir(parents=True, exist_ok=True)
            newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"])

            def compile_pass(job: tuple[str, str]) -> str:
                name, capability = job
                lanes, machine = CAPABILITIES[capability]
                target = objects / f"{name}.{capability}.o"
                if target.exists() and target.stat().st_mtime > newest and "CXXFLAGS" not in os.environ:
                    return str(target)
                defines = [f"-DRHYTHM_CAPABILITY={capability}", f"-DRHYTHM_LANES={lanes}"]
                flags = ["-std=c++17", *FLAGS, *machine, *defines, *shlex.split(os.environ.get("CXXFLAGS", ""))]
                source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
                if subprocess.run([*compiler(), *flags, "-c", str(source), "-o", str(target)]).returncode:
                    raise CompileError(f"csrc/cpu/{name}.cpp does not compile for {capability}")
                return str(target)

            jobs = [(name, capability) for name in PASSES for capability in CAPABILITIES]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                ext.extra_objects = list(pool.map(compile_pass, jobs))
            super().build_extension(ext)

    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()
    name = (version or ["unknown"])[0].replace('"', "")
    extension = CppExtension(
        "rhythm_kernels._C",
        ["csrc/bindings.cpp", "csrc/cpu/credit.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/launch.cpp"],
        py_limited_api=True,
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],
        extra_compile_args={"cxx": [*FLAGS, *TARGET, f'-DRHYTHM_COMPILER="{name}"']},
        extra_link_args=["-s"] if sys.platform == "linux" and "LDFLAGS" not in os.environ else [],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


BUILDING = {"bdist_wheel", "build_ext", "build", "install", "develop", "editable_wheel"} & set(sys.argv)
reason = why_not() if BUILDING else ""
if reason:
    print(
        f"rhythm-kernels: building without the compiled CPU kernels, because {reason}; everything works, slower. "
        "To build them, install torch>=2.10 and a C++17 compiler, then run `pip install --no-build-isolation .`",
        file=sys.stderr,
    )
setup(**(native() if BUILDING and not reason else {}))
