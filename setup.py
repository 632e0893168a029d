"""Builds `rhythm_kernels._C`, the compiled kernels; without torch or a C++ compiler, a pure Python package.

Everything else about the package is in pyproject.toml. Nothing is downloaded. Variables:

CXX, CC            the C++ compiler; CXXFLAGS, LDFLAGS: added
MAX_JOBS           parallel compilations, at least 1 (default: the processors)
RHYTHM_CUDA        0: without CUDA kernels; 1: an error where they cannot be built; unset: built where nvcc is
                   ($CUDA_HOME/bin/nvcc, else nvcc on the PATH). A CUDA torch is not needed, nor a GPU.
RHYTHM_CUDA_ARCHS  compute capabilities without the dot, separated by `;`: `80`, `90a` (code for that chip alone),
                   `100+PTX` (also code that later chips compile for themselves). Default 80;90a;100+PTX, without
                   those that nvcc is too old for; one that is asked for and unknown to nvcc is an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
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
INCLUDE = f"-I{ROOT / 'csrc' / 'include'}"
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", INCLUDE]
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-DRHYTHM_X86"] if X86 else [])]
CUDA_ARCHS = "80;90a;100+PTX"
CUDA_SOURCES = ("band_rows", "band_columns", "credit", "error")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def output(*command: str) -> str:
    """What a command says; empty where it cannot run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def why_not() -> str:
    """Why the kernels cannot be built here, or ""."""
    if sys.platform != "linux":
        return f"they are built on Linux, not on {sys.platform}"
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


def max_jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    if not re.fullmatch("0*[1-9][0-9]*|", asked):
        raise SystemExit(f"MAX_JOBS must be a number of at least 1 or unset, got {asked!r}")
    return int(asked or os.cpu_count() or 1)


def cuda_wanted() -> str:
    wanted = os.environ.get("RHYTHM_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RHYTHM_CUDA must be 0, 1 or unset, got {wanted!r}")
    return wanted


class Cuda(NamedTuple):
    """How the CUDA sources are compiled, or why they are not."""

    reason: str = ""
    command: tuple[str, ...] = ()  # nvcc and its flags
    version: str = ""
    archs: str = ""
    link: tuple[str, ...] = ()

    @classmethod
    def found(cls) -> Cuda:
        wanted = cuda_wanted()
        cuda = cls("RHYTHM_CUDA=0 was set when it was built") if wanted == "0" else cls._of_nvcc()
        if wanted == "1" and cuda.reason:
            raise SystemExit(f"RHYTHM_CUDA=1, but the CUDA kernels cannot be built: {cuda.reason}")
        return cuda

    @classmethod
    def _of_nvcc(cls) -> Cuda:
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
        if nvcc is None:
            return cls(
                f"no nvcc was found {f'in CUDA_HOME={home}' if home else 'on the PATH, and CUDA_HOME is not set'}"
            )
        host = ["-ccbin", compiler()[0]] if "CXX" in os.environ and len(compiler()) == 1 else []
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("__global__ void one(int* x) {\n  *x = 1;\n}\n")
            if not output(nvcc, *host, "--version") or not cls._builds(nvcc, host, source):
                return cls(f"`{shlex.join([nvcc, *host])}` cannot build a three-line program")
            libraries = re.findall(r'"(-L[^"]+)"', output(nvcc, "--dryrun", str(source)))
        version = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
        if version is None:
            return cls(f"`{nvcc} --version` names no release")
        gencode, archs = cls._gencode(nvcc)
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all", INCLUDE]
        # The runtime is linked in, its symbols hidden: those of torch's own, another version perhaps, must not take
        # their place. Neither torch's CUDA library nor the driver's is linked, so that any machine can load the result.
        link = [*libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a"]
        command = [nvcc, *host, *flags, *gencode]
        return cls("", tuple(command), version.group(1), archs, tuple(link))

    @staticmethod
    def _builds(nvcc: str, host: list[str], source: Path) -> bool:
        command = [nvcc, *host, "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
        return subprocess.run(command, capture_output=True).returncode == 0

    @staticmethod
    def _gencode(nvcc: str) -> tuple[list[str], str]:
        """nvcc's flags for the architectures, and their names."""
        asked = os.environ.get("RHYTHM_CUDA_ARCHS", "")
        entries = [entry.strip() for entry in (asked or CUDA_ARCHS).split(";") if entry.strip()]
        if not entries:
            raise SystemExit(f"RHYTHM_CUDA_ARCHS must name a compute capability, got {asked!r}")
        known = {int(number) for number in re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))}
        flags, kept = [], []
        for entry in entries:
            match = re.fullmatch(r"((\d+)[af]?)(\+PTX)?", entry)
            if match is None:
                raise SystemExit(f"RHYTHM_CUDA_ARCHS must be like 80;90a;100+PTX, got {entry!r} in it")
            name, number, ptx = match.groups()
            if int(number) < 80:
                raise SystemExit(f"RHYTHM_CUDA_ARCHS must be 80 or later, got {entry!r} in it")
            if int(number) not in known:
                if asked:
                    raise SystemExit(f"RHYTHM_CUDA_ARCHS must be among {sorted(known)} for {nvcc}, got {entry!r}")
                print(f"rhythm-kernels: {nvcc} is too old for compute capability {name}: left out", file=sys.stderr)
                continue
            code = f"[sm_{name},compute_{name}]" if ptx else f"sm_{name}"
            flags += ["-gencode", f"arch=compute_{name},code={code}"]
            kept.append(entry)
        if not kept:
            raise SystemExit(
                f"{nvcc} knows none of the compute capabilities {';'.join(entries)}: set RHYTHM_CUDA_ARCHS"
            )
        return flags, ";".join(kept)


def native() -> dict:
    """The arguments of `setup` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cuda, jobs_at_once = Cuda.found(), max_jobs()
    if cuda.reason:
        print(f"rhythm-kernels: building without the CUDA kernels: {cuda.reason}", file=sys.stderr)

    class Build(BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": False})

        def build_extension(self, ext) -> None:
            objects = Path(self.build_temp, "kernels").resolve()
            objects.mkdir(parents=True, exist_ok=True)
            settings = objects / "settings"  # what, besides the sources, objects come from
            current = repr((compiler(), os.environ.get("CXXFLAGS"), cuda))
            if not settings.exists() or settings.read_text() != current:
                self.force = True

            def compiled(source: str, target: Path, command: list[str], purpose: str) -> str:
                read = [*ROOT.glob(f"{Path(source).parent}/*.*"), *ROOT.glob("csrc/include/**/*.h"), ROOT / "setup.py"]
                newest = max(path.stat().st_mtime for path in read)
                if not self.force and target.exists() and target.stat().st_mtime > newest:
                    return str(target)
                if subprocess.run([*command, "-c", str(ROOT / source), "-o", str(target)]).returncode:
                    target.unlink(missing_ok=True)
                    raise CompileError(f"{source} does not compile for {purpose}")
                return str(target)

            jobs = []
            for name in CUDA_SOURCES if not cuda.reason else ():
                jobs.append((f"csrc/cuda/{name}.cu", objects / f"{name}.cuda.o", [*cuda.command], cuda.archs))
            more = shlex.split(os.environ.get("CXXFLAGS", ""))
            for name in PASSES:
                for capability, (lanes, machine) in CAPABILITIES.items():
                    defines = [f"-DRHYTHM_CAPABILITY={capability}", f"-DRHYTHM_LANES={lanes}"]
                    command = [*compiler(), "-std=c++17", *FLAGS, *machine, *defines, *more]
                    jobs.append((f"csrc/cpu/{name}.cpp", objects / f"{name}.{capability}.o", command, capability))
            with ThreadPoolExecutor(jobs_at_once) as pool:
                ext.extra_objects = list(pool.map(lambda job: compiled(*job), jobs))
            super().build_extension(ext)
            settings.write_text(current)

    version = (output(*compiler(), "--version").splitlines() or ["unknown"])[0]
    words = {"COMPILER": version, "CUDA_REASON": cuda.reason, "CUDA_ARCHS": cuda.archs, "NVCC": cuda.version}
    defines = ['-DRHYTHM_{}="{}"'.format(name, text.replace('"', "")) for name, text in words.items()]
    sources = ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("credit", "dispatch", "launch"))]
    extension = CppExtension(
        "rhythm_kernels._C",
        sources if cuda.reason else [*sources, "csrc/bindings_cuda.cpp"],
        py_limited_api=True,
        depends=["setup.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*")))],
        extra_compile_args={"cxx": [*FLAGS, *TARGET, *defines]},
        extra_link_args=[*cuda.link, *(["-s"] if sys.platform == "linux" and "LDFLAGS" not in os.environ else [])],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# pip does not look at pyproject.toml's own requirement where it is told --no-build-isolation.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"rhythm-kernels: setuptools {setuptools.__version__} is too old to build it: run "
        "`pip install 'setuptools>=77'` and then this again"
    )
BUILDING = {"bdist_wheel", "build_ext", "build", "install", "develop", "editable_wheel"} & set(sys.argv)
reason = why_not() if BUILDING else ""
if reason:
    if cuda_wanted() == "1":
        raise SystemExit(f"RHYTHM_CUDA=1, but no compiled kernels can be built: {reason}")
    advice = "To build them, install torch>=2.10 and a C++17 compiler, then run `pip install --no-build-isolation .`"
    print(
        f"rhythm-kernels: building without the compiled kernels, because {reason}; everything works, slower. "
        f"{advice if sys.platform == 'linux' else ''}",
        file=sys.stderr,
    )
setuptools.setup(**(native() if BUILDING and not reason else {}))
