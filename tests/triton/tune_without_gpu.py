"""Run the tuner with a stand-in for the GPU's driver, which loads what was compiled and launches nothing.

A script of its own, because a process that interprets kernels cannot compile them. Nothing is computed, so all tiles
agree; the driver makes those of `column_stats` with little shared memory spill, and has too little for large ones.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton.testing

import rhythm_kernels.backend.triton as passes
from rhythm_kernels.backend.triton import choosing, tile_file
from rhythm_kernels.tuning import tune

from .without_gpu import Driver

SHARED = 66 * 1024  # bytes of a block at most
SPILLING = 30 * 1024  # bytes below which a kernel spills


def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
    """Module, function, registers, spilled words, threads of a block at most."""
    return 1, 1, 100, 5 if name == "column_stats_kernel" and shared < SPILLING else 0, 1024


class Launching(Driver):
    """A driver that loads what was compiled, and whose launches do nothing."""

    utils = SimpleNamespace(
        load_binary=load_binary,
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": SHARED},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def do_bench(call: Any, **_: Any) -> float:
    """Tiles of 16 rows are fast."""
    call()
    return 0.5 if choosing.choose("column_stats", "sm_80", 16, 128).rows == 16 else 1.0


def main(given: list[str]) -> int:
    triton.runtime.driver.set_active(Launching("sm_80"))
    triton.testing.do_bench = do_bench
    torch.cuda.synchronize = lambda device=None: None
    choosing.architecture = lambda device: "sm_80"
    passes.available = lambda device: ""
    tile_file.capability, tile_file.device_name = lambda: "8.0", lambda: "stand-in"
    return tune.main(given)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
