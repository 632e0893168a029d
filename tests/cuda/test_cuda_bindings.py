"""From the public functions through `rhythm_kernels.backend.cuda` and the bindings to the CUDA kernels, all on the CPU.

The bindings are compiled beside the emulated kernels, with the CPU's dispatch key in place of CUDA's. What stays
untested without a GPU is the current device and stream.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import rhythm_kernels as rk
from rhythm_kernels.backend import cuda, extension
from rhythm_kernels.rule import Choice, Rule

from ..cases import BANDS, CASES, Case, check
from ..credit_cases import many_tokens
from .emulated import EMULATION, FLAGS, KERNELS, ROOT, compiler

NAMES = ("plain", "packed", "everything", "padding on both sides, an empty row", "bfloat16")
SOURCES = [KERNELS / f"{name}.cu" for name in ("band_rows", "band_columns", "credit", "error")]


def compile_objects(folder: Path) -> Path:
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}", f"-I{EMULATION}"]
    torch_includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    definitions = ["RHYTHM_CUDA_LIBRARY=rhythm_kernels_emulated", "RHYTHM_CUDA_KEY=CPU"]
    definitions.append("TORCH_TARGET_VERSION=0x020a000000000000")
    kernels = ["-x", "c++", "-O1", "-include", str(EMULATION / "emulation.h"), *map(str, SOURCES)]
    kernels.append(str(EMULATION / "emulation.cpp"))
    bindings = ["-O0", *torch_includes, *(f"-D{x}" for x in definitions), str(ROOT / "csrc" / "bindings_cuda.cpp")]
    flags = [flag for flag in FLAGS if flag != "-shared"]
    for arguments in (kernels, bindings):
        subprocess.run([*compiler(), *flags, *includes, "-c", *arguments], cwd=folder, check=True)
    library = folder / "emulated.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    objects = [str(path) for path in folder.glob("*.o")]
    subprocess.run([*compiler(), "-shared", *objects, *link, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.ops.load_library(compile_objects(tmp_path_factory.mktemp("bindings")))


@pytest.fixture(autouse=True)
def emulated_extension(emulated: None, cuda_serves_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "registered", lambda: torch.ops.rhythm_kernels_emulated)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned_memory")
def test_bands(case: Case, per_head: bool) -> None:
    check(replace(case, options={**case.options, "per_head": per_head}), "cuda", passes=BANDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["local", "global", "coupled", "entropy", "random"])
@pytest.mark.usefixtures("poisoned_memory")
def test_credit(mode: str, dtype: torch.dtype) -> None:
    waad, fai, mask = (x.view(4, -1) for x in many_tokens(2000))
    waad, fai = waad.to(dtype), fai.to(dtype)
    options = {"mode": mode, "entropy": waad.flip(1), "tau_waad": 4.0, "neighbors": 2}
    got, want = (
        rk.rhythm_credit(waad, fai, mask, backend=name, generator=torch.Generator().manual_seed(5), **options)
        for name in ("cuda", "reference")
    )
    assert torch.equal(got, want)


def test_what_does_not_fit_is_refused() -> None:
    q, lse = torch.randn(1, 20, 2, 16), torch.zeros(1, 2, 20)
    seqs = torch.tensor([[0, 0, 20, 0]], dtype=torch.int32)
    heads = torch.tensor([[0, 0]], dtype=torch.int32)
    rule = Rule(seqs, heads, 20, 1.0, 0.0, -1, None)
    with pytest.raises(RuntimeError, match=r"k must have the same dtype as q, got Half \(1, 20, 2, 16\)"):
        cuda.band_rows(q, q.half(), lse, rule, 10, False)
    with pytest.raises(RuntimeError, match="max_seqlen must be from 0 to T"):
        cuda.band_rows(q, q, lse, rule._replace(max_seqlen=21), 10, False)
    with pytest.raises(RuntimeError, match=r"lse must be float32 \(B, X, T\), got Float \(2, 20\)"):
        cuda.band_columns(q, q, lse[0], rule, 3, 9, False)
    waad = torch.rand(1, 20)
    choice = Choice("global", 0.4, 3, False, None, None, [1.0] * 6)
    with pytest.raises(RuntimeError, match=r"mask must be contiguous bool .*, got Float \(1, 20\)"):
        cuda.credit(waad, waad, None, waad, choice)
    short = torch.empty(10, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"scratch must be contiguous uint8 with at least .*, got Byte \(10\)"):
        extension.registered().cuda_credit(waad, waad, None, waad > 0, *choice, short, waad.clone())


CHIPS = {
    (7, 5): "need compute capability 8.0 or later, the device has 7.5",
    (8, 0): "", (8, 9): "", (9, 0): "", (10, 0): "", (10, 3): "", (12, 0): "",
}  # fmt: skip


@pytest.mark.parametrize("capability", CHIPS)
def test_which_chips_the_default_architectures_serve(capability: tuple[int, int]) -> None:
    reason = cuda._unserved(capability, ["80", "90a", "100+PTX"], "13.0", (13, 0))
    assert CHIPS[capability] in reason and bool(reason) == bool(CHIPS[capability])


def test_which_chips_one_architecture_serves() -> None:
    def unserved(capability: tuple[int, int], arch: str) -> str:
        return cuda._unserved(capability, [arch], "12.8", (13, 1))

    assert "built for 80, the device has 9.0" in unserved((9, 0), "80")
    assert not unserved((9, 0), "80+PTX")
    assert unserved((8, 0), "86+PTX")
    assert unserved((12, 0), "90a+PTX")  # what is written for one chip has no later one
    assert not unserved((10, 3), "100f")
    assert unserved((10, 3), "100a")


@pytest.mark.parametrize(
    ("archs", "nvcc", "driver", "serves"),
    [
        (["80"], "12.8", (12, 4), True),  # machine code: any driver of the major version
        (["80"], "13.0", (12, 9), False),
        (["70+PTX"], "12.8", (12, 4), False),  # PTX: a driver as new as its nvcc
        (["70+PTX"], "12.8", (12, 8), True),
        (["70+PTX"], "12.8", (13, 0), True),
        (["70+PTX", "80"], "12.8", (12, 4), True),
    ],
)
def test_which_drivers_serve(archs: list[str], nvcc: str, driver: tuple[int, int], serves: bool) -> None:
    reason = cuda._unserved((8, 6), archs, nvcc, driver)
    told = f"built by nvcc {nvcc}, the driver is of CUDA {driver[0]}.{driver[1]}: install a newer driver"
    assert reason == "" if serves else told in reason


def test_the_driver_is_asked_for_its_version(tmp_path: Path) -> None:
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuDriverGetVersion(int* version) { *version = 12040; return 0; }\n')
    subprocess.run([*compiler(), "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1"], check=True)
    command = [sys.executable, "-c", "from rhythm_kernels.backend import cuda; print(cuda._driver())"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(12, 4)\n"
