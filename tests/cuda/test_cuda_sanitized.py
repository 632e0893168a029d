"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .emulated import ROOT, sanitized_environment

PLANTED = """
import ctypes
from tests.cuda.emulated import Emulated, build
from tests.cuda.test_cuda_emulation import PROBES
probes = Emulated(build([PROBES], sanitize=True))
x = (ctypes.c_int * 300)()
probes.set_order("shuffled", 1)
probes.call("probe_{good}", x, x, 64)
print("the right one went through", flush=True)
probes.call("probe_{bad}", x, {n})
"""


def python(*arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=sanitized_environment(), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "n", "message"),
    [("past_the_end", 300, "heap-buffer-overflow"), ("past_shared", 64, "index 64 out of bounds")],
)
def test_an_access_out_of_bounds_is_found(bad: str, n: int, message: str) -> None:
    done = python("-c", PLANTED.format(good="reversed", bad=bad, n=n), timeout=300)
    assert "the right one went through" in done.stdout, done.stderr
    assert done.returncode != 0
    assert message in done.stderr
    assert f"in {bad}" in done.stderr
    assert "probes.cu" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", ["bands", "credit"])
def test_the_kernels_are_clean(name: str) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/cuda/test_cuda_{name}.py", timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
