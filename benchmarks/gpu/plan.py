"""The steps of both calls, as data: the most wanted first, so that what a limit cuts is what matters least.

Limits are seconds on an H100 with sixteen cores: what a step takes there by the operations it makes, and as much again
for starting, compiling and holding results to float64. No step was timed on a GPU yet.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .steps import Step

SECONDS = {"right": 240.0, "fast": 480.0}
# Where the tests marked `gpu` are: collecting the whole of `tests` imports everything that the extras bring.
GPU_TESTS = ("tests/gpu", "tests/triton/test_triton_tune.py")
_LARGE = "million"  # in the name of what takes gigabytes and half a minute
_COMPILED = "reduce_overhead"  # in the name of what Inductor compiles
_BANDS = ("rhythm triton", "rhythm cuda")
_SDPA = ("SDPA FlashAttention", "SDPA cuDNN")
_PROBE = ("forward alone", "forward + probe", "probe's own kernels")
_CEILINGS = ("copy kernel", "matrix product")
_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"


@dataclass(frozen=True)
class Plan:
    """`out`: the folder of results; `rehearse`: everything on the CPU and tiny, to check the calls themselves."""

    call: str
    out: Path
    rehearse: bool = False

    @property
    def entries(self) -> Path:
        return self.out / f"{self.call}-rows.json"

    def results(self) -> list[Path]:
        """Files that the steps add to."""
        return [self.entries, *([self.out / "first.json", self.out / "tiles.jsonl"] if self.call == "right" else [])]

    def steps(self) -> list[Step]:
        return list({"right": self._right, "fast": self._fast}[self.call]())

    def _bench(
        self, name: str, limit: float, suites: tuple[str, ...], lengths: tuple[int, ...], *rivals: str,
        seconds: float = 3.0,
    ) -> Step:  # fmt: skip
        """Suites in a process of their own, at some of their full shapes."""
        command = [sys.executable, "-m", "benchmarks", "--save", str(self.entries), "--resume", "--deadline", "{left}"]
        for suite in suites:
            command += ["--suite", suite]
        for rival in rivals:
            command += ["--among", rival]
        if self.rehearse:
            return Step(name, [*command, "--device", "cpu", "--profile", "tiny"], limit)
        for length in lengths:
            command += ["--length", str(length)]
        return Step(name, [*command, "--device", "cuda", "--seconds", str(seconds)], limit)

    def _tests(self, name: str, limit: float, which: str, *options: str) -> Step:
        command = [sys.executable, "-m", "pytest", *GPU_TESTS, "-q", "-p", "no:cacheprovider", "-rfE", "--durations=15"]
        command += ["--junitxml", str(self.out / f"{name}.xml")]
        if self.rehearse:  # those that run on a CPU: the functions that the others call
            return Step(name, [*command, "-k", "rehearsal"], limit, shown=3)
        return Step(name, [*command, "-m", "gpu", "-k", which, *options], limit, shown=40)

    def _right(self) -> Iterator[Step]:
        """Is it right? Its first step also measures what decides the launch choices and the backend of the bands."""
        command = [sys.executable, "-m", "tests.gpu.first", "--out", str(self.out), "--seconds", "{left}"]
        yield Step("first", [*command, "--rehearse"] if self.rehearse else command, 150, shown=80)
        yield self._tests("tests", 110, f"not {_LARGE} and not {_COMPILED}", "-n", "10")

    def _fast(self) -> Iterator[Step]:
        """Is it fast?"""
        streams = ("attention", "row_stats", "column_stats")
        yield self._bench(
            "streams", 100, streams, (8192, 32_768), "rhythm triton", *_SDPA, "flash-colreduce", *_CEILINGS
        )
        bands = ("band_rows", "band_columns")
        yield self._bench("bands", 70, bands, (8192, 32_768, 131_072), *_BANDS, _SDPA[0], "eager maps", "copy kernel")
        yield self._bench("probe", 130, ("probe",), (), *_PROBE, seconds=3)
        yield self._bench("step", 105, ("grpo_step", "countdown_step"), (), seconds=5)
        yield self._bench("million", 50, bands, (1_048_576,), *_BANDS, "copy kernel", seconds=1)
        yield self._memcheck()
        yield self._tests("large", 60, _LARGE)
        yield self._bench("backward", 40, ("attention_backward",), (8192,), "rhythm triton", *_SDPA, *_CEILINGS)
        yield self._bench("eager", 40, ("probe",), (8192,), _PROBE[0], "eager with hooks", seconds=2)
        yield self._tests("compiled", 60, _COMPILED)
        yield self._bench(
            "flex", 60, ("band_columns", "attention"), (8192,), "FlexAttention", "rhythm triton", seconds=2
        )

    def _memcheck(self) -> Step:
        """The CUDA kernels' memory accesses, each tensor in an allocation of its own."""
        program = [sys.executable, "-m", "tests.gpu.sanitized", "--backend", "cuda"]
        if self.rehearse:
            return Step("memcheck", [sys.executable, "-m", "tests.gpu.sanitized"], 60, shown=1)
        tool = shutil.which("compute-sanitizer") or _SANITIZER
        # `no`: torch asks the driver for symbols that it may lack, which is no error of a kernel.
        options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "20"]
        return Step("memcheck", [tool, *options, *program], 70, 4, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
