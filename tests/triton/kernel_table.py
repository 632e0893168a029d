"""The tables of docs/kernels.md: what each kernel must do, what its tiles read, what it costs as compiled and reads as.

``python -m tests.triton.kernel_table`` prints them, ``--write`` puts them into the document, between the
comments that name them. Compiling every kernel for every architecture takes a minute or two; no GPU is needed. The
readings have a table for each Triton they are made with: ``--table read-3.6`` wants Triton 3.6.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import triton

from benchmarks.shapes import AttentionShape
from benchmarks.suites import SUITES
from benchmarks.work import Work, k_bytes, lse_bytes, q_bytes
from rhythm_kernels.backend.triton import choosing, configs

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
SHAPE = AttentionShape(8192, dim=128, dtype="bfloat16")
LENGTHS = (8192, 32_768)
# H100 SXM, the vendor's published peaks, a second: memory, dense bfloat16 tensor cores, float32 CUDA cores. And 16
# exponentials a clock on each of 132 SMs at 1.83 GHz, the clock at which the second is quoted.
BYTES, TENSOR_CORES, CUDA_CORES, EXPONENTIALS = 3.35e12, 989e12, 67e12, 16 * 132 * 1.83e9
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def backward_work(shape: AttentionShape) -> Work:
    """Five products where the forward pass has two; q, k, v, out, its gradient and lse in; three gradients out."""
    forward = SUITES["attention"].work(shape).flops
    return Work(4 * q_bytes(shape) + 4 * k_bytes(shape) + lse_bytes(shape), forward // 2 * 5)


# Kernel or kernels, its work, products of D a pair.
MUST = {name: (SUITES[name].work, 1) for name in SUITES if name.startswith(("band", "row", "column"))} | {
    "attention": (SUITES["attention"].work, 2),
    "attention backward": (backward_work, 5),
}  # fmt: skip


def time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def work_table() -> Iterator[str]:
    """Bytes, operations and exponentials, and the times that an H100 cannot go below."""
    yield "| pass | T | bytes | operations | exp2 | for bytes | for operations | for exp2 | **floor** | in float32 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, (work, products) in MUST.items():
        for length in LENGTHS:
            shape = replace(SHAPE, length=length)
            done = work(shape)
            exponentials = done.flops // (2 * shape.dim * products)
            times = (done.bytes / BYTES, done.flops / TENSOR_CORES, exponentials / EXPONENTIALS)
            in_float32 = max(work(replace(shape, dtype="float32")).bytes / BYTES, done.flops / CUDA_CORES, times[2])
            cells = [name, f"{length:,}", f"{done.bytes / 1e6:,.1f} MB", f"{done.flops / 1e9:,.1f} G"]
            cells += [f"{exponentials / 1e9:,.3f} G", *map(time, times), f"**{time(max(times))}**", time(in_float32)]
            yield f"| {' | '.join(cells)} |"


def tiles_table() -> Iterator[str]:
    """What the tiles of the band kernels read, ask for and compute, over what they must."""
    shape = SHAPE
    heads_per_kv, head = shape.heads // shape.kv_heads, shape.dim * shape.itemsize
    yield "| kernel | architecture | rows x keys | tokens read | bytes asked for | pairs computed |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in ("band_rows", "band_columns"):
        for arch in ARCHITECTURES:
            tile = choosing.choose(name, arch, 16, shape.dim)
            if name == "band_rows":
                own, step, needed, reach = tile.rows, tile.keys, shape.window, tile.rows + shape.window - 1
            else:
                own, step, reach = tile.keys, tile.rows, tile.keys + shape.hi - shape.lo
                needed = shape.hi - shape.lo + 1
            halo = reach / own
            asked = (head + halo * head + 4 * (halo if name == "band_columns" else 1)) / (
                head + head / heads_per_kv + 4
            )
            computed = -(-reach // step) * step / needed
            yield f"| {name} | {arch} | {tile.rows} x {tile.keys} | {halo:.2f} | {asked:.2f} | {computed:.1f} |"


def compiled_table() -> Iterator[str]:
    """Tile, registers a thread and shared memory a block of every kernel on every architecture."""
    from .aot_compile import compile_one, launched

    yield f"Triton {triton.__version__}, bfloat16, D = {SHAPE.dim}, plain rule:"
    yield ""
    cells: dict[str, dict[str, str]] = {}
    for arch in ARCHITECTURES:
        for launch in launched(arch, "bf16", SHAPE.dim, SHAPE.dim, frozenset()):
            report = compile_one(launch, arch)
            tile = launch.tile
            spills = f", **{report['spills']} spills**" if report["spills"] else ""
            cells.setdefault(launch.name, {})[arch] = (
                f"{tile.rows} x {tile.keys}, {tile.warps}w {tile.stages}s: {report['registers']} regs, "
                f"{report['shared'] / 1024:.0f} KiB{spills}"
            )
    yield f"| kernel | {' | '.join(ARCHITECTURES)} |"
    yield f"| --- |{' --- |' * len(ARCHITECTURES)}"
    for name, row in cells.items():
        yield f"| {name} | {' | '.join(row[arch] for arch in ARCHITECTURES)} |"


def reading_table() -> Iterator[str]:
    """What the main loop of every kernel reads as on sm_90."""
    from . import sass

    yield f"Triton {triton.__version__}, bfloat16, D = {SHAPE.dim}, plain rule, sm_90:"
    yield ""
    yield (
        "| kernel | tile | registers | blocks per SM | slots per pair | ahead: copies, loads, of | "
        "issue, exp2, products, L2 | overlapped to in turn | **predicted** |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for kernel in configs.TILES[sass.ARCH]:
        for x, _ in sass.readings(kernel, SHAPE.dim):
            spills = f", **{x.spills} spills**" if x.spills else ""
            ahead = ", ".join("-" if n < 0 else str(n) for n in (x.copies_ahead, x.loads_ahead))
            cells = [kernel, sass.words(x.tile), f"{x.registers}{spills}", str(x.blocks), f"{x.slots:.1f}"]
            cells += [f"{ahead}, {x.loop}", ", ".join(f"{clocks:.0f}" for clocks in x.clocks)]
            cells += [f"{x.overlapped:.0f} to {x.in_turn:.0f}", f"**{x.predicted:.0f}**"]
            yield f"| {' | '.join(cells)} |"


TABLES = {
    "work": work_table, "tiles": tiles_table, "compiled": compiled_table,
    f"read-{'.'.join(triton.__version__.split('.')[:2])}": reading_table,
}  # fmt: skip


def between(name: str) -> re.Pattern[str]:
    """What the document has under a table's name."""
    return re.compile(rf"(<!-- {name}: [^>]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    parser.add_argument("--table", action="append", choices=list(TABLES))
    given = parser.parse_args()
    for name in given.table or TABLES:
        text = "\n".join(TABLES[name]()) + "\n"
        print(text)
        if given.write:
            document, n = between(name).subn(
                lambda found, text=text: found[1] + text + found[3], DOCUMENT.read_text(encoding="utf-8")
            )
            assert n == 1, f"{DOCUMENT} has {n} places for the table {name}"
            DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
