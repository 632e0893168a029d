"""Read from the machine code of a kernel's main loop what it will be held up by, without a GPU.

``python -m tests.triton.sass --kernel column_stats --head-size 128 [--tile 64,128,4,3,168]`` compiles for sm_90 what a
user's call compiles, disassembles it, finds the loop over whole tiles, and prints one line: registers, spills, shared
memory, blocks an SM, the instructions that a lane issues for a pair of tokens, and how far ahead of their use the loads
stand. ``--code`` prints the loop itself, ``--json`` the reading as data. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from rhythm_kernels.backend.triton import choosing, configs

from .aot_compile import TOOLS, launched, nvidia_resources
from .without_gpu import TARGETS

ARCH = "sm_90"
# What an SM of compute capability 9.0 has; a block takes 1 KiB of shared memory besides its own.
REGISTERS, THREADS, SHARED, BLOCK_SHARED, BLOCKS = 65536, 2048, 228 * 1024, 1024, 32
# What an SM does in a clock: warp instructions issued, exponentials, multiply-adds of 16-bit tensor-core products.
SCHEDULERS, EXPONENTIALS, MULTIPLY_ADDS = 4, 16, 2048
# Assumed, not published: bytes that an SM gets from the L2 cache in a clock while all of them ask, and the clocks that
# a load from there takes.
L2_BYTES, LATENCY = 28, 600
# Products of D that a kernel's loop makes of each pair.
PRODUCTS = {"attention": 2, "attention_alone": 2, "attention_dq": 3, "attention_dkv": 4}


class Instruction(NamedTuple):
    """One line of the disassembly: `@!P0 LDG.E R2, desc[UR4][R6.64]` at its address."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split(" ")[0]


class Reading(NamedTuple):
    """One kernel as compiled. Issue slots are of the loop over whole tiles."""

    kernel: str
    tile: configs.Tile
    triton: str
    registers: int
    spills: int
    shared: int  # bytes a block
    blocks: int  # that fit an SM at once
    loop: int  # instructions a warp issues for one tile
    pairs: int  # of tokens in a tile
    slots: float  # instructions a lane issues for a pair
    exponentials: float  # of them, MUFU.EX2
    matrix: str  # the tensor-core instruction
    copies_ahead: int  # issue slots between asynchronous copies to shared memory and the wait for them; -1 without
    loads_ahead: int  # issue slots between a plain load and its first use, the least in the loop; -1 without
    bytes: float  # that are copied to shared memory for a pair
    clocks: tuple[float, float, float, float]  # an SM needs for 1,024 pairs: issue, exponentials, products, L2
    waits: float  # clocks more for 1,024 pairs where a block waits for loads that are asked for too late

    @property
    def overlapped(self) -> float:
        """Clocks an SM needs for 1,024 pairs if blocks hide each other's waits."""
        return max(self.clocks)

    @property
    def in_turn(self) -> float:
        """The same, if loads, products and the rest take turns, as in one block whose warps wait for each other."""
        return max(self.clocks[2] + max(self.clocks[:2]) + self.waits, self.clocks[3])

    @property
    def predicted(self) -> float:
        """In turn with one block on an SM; between the two, the nearer to `overlapped` the more blocks there are."""
        return self.overlapped + (self.in_turn - self.overlapped) / self.blocks


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and the index of the instruction at each label."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)
        if found:
            instructions.append(Instruction(int(found[1], 16), found[2].strip("{} ")))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The innermost loops: a jump back, and no other between its target and itself."""
    spans = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"\((\.L\w+)\)", instruction.text)
        if instruction.opcode.startswith("BRA") and target and labels[target[1]] < i:
            spans.append((labels[target[1]], i + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [instructions[begin:end] for begin, end in inner]


def multiply_adds(loop: list[Instruction], warps: int) -> int:
    """Of all tensor-core instructions that a block issues in one round of the loop."""
    total = 0
    for instruction in loop:
        group = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode)
        if group:
            total += int(group[1]) * int(group[2]) * int(group[3]) * warps // 4  # one for four warps
        if re.match(r"HMMA\.16816", instruction.opcode):
            total += 16 * 8 * 16 * warps
        elif re.match(r"HMMA\.1688", instruction.opcode):
            total += 16 * 8 * 8 * warps
    return total


def copies_ahead(loop: list[Instruction]) -> int:
    """Issue slots from the last group of asynchronous copies of a round to the wait that it must pass; -1 without."""
    commits = [i for i, x in enumerate(loop) if x.opcode.startswith("LDGDEPBAR")]
    waits = [(i, int(x.text.rsplit(",", 1)[1], 16)) for i, x in enumerate(loop) if x.opcode.startswith("DEPBAR.LE")]
    if not commits or not waits:
        return -1
    # A wait that leaves n groups in flight passes the groups that are older: the newest of them is the n-th before it.
    found = []
    for wait, left in waits:
        before = [i for i in commits if i < wait]
        behind = left - len(before)
        if behind < 0:
            found.append(wait - before[-1 - left])
        else:
            rounds, which = divmod(behind, len(commits))
            found.append((rounds + 1) * len(loop) + wait - commits[-1 - which])
    return min(found)


def copy_width(opcode: str) -> int:
    """Bytes that a lane copies with an LDGSTS."""
    return 16 if ".128" in opcode else 8 if ".64" in opcode else 4


def registers_of(word: str) -> set[int]:
    return {int(n) for n in re.findall(r"\bR(\d+)\b", word)}


def loads_ahead(loop: list[Instruction]) -> int:
    """The least number of issue slots from a plain load to the first instruction that reads it; -1 without loads."""
    found = []
    for i, load in enumerate(loop):
        if not load.opcode.startswith("LDG.") or "," not in load.text:
            continue
        target = registers_of(load.text.split(load.opcode, 1)[1].split(",", 1)[0])
        following = loop[i + 1 :] + loop[: i + 1]
        for ahead, x in enumerate(following, 1):
            operands = x.text.split(x.opcode, 1)[1]
            reads = operands if x.opcode.startswith(("ST", "RED")) else operands.partition(",")[2]
            if target & registers_of(reads):
                found.append(ahead)
                break
    return min(found, default=-1)


def blocks_an_sm(registers: int, shared: int, warps: int) -> int:
    """How many blocks fit at once: registers go to warps in units of 8 a thread."""
    in_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(in_registers, SHARED // (shared + BLOCK_SHARED), THREADS // (32 * warps), BLOCKS)


def main_loop(instructions: list[Instruction], labels: dict[str, int], warps: int) -> list[Instruction]:
    """The loop with tensor-core instructions that spends the fewest instructions on each multiply-add: no masks."""
    products = [loop for loop in loops(instructions, labels) if multiply_adds(loop, warps)]
    assert products, "no loop with tensor-core instructions"
    return min(products, key=lambda loop: len(loop) / multiply_adds(loop, warps))


def read(
    name: str, asm: dict[str, Any], shared: int, tile: configs.Tile, products_of: int
) -> tuple[Reading, list[Instruction]]:  # fmt: skip
    """The reading of one compiled kernel, and its main loop; `products_of`: multiply-adds that a pair takes."""
    instructions, labels = disassemble(asm["cubin"])
    resources = nvidia_resources(asm)
    loop = main_loop(instructions, labels, tile.warps)
    pairs = multiply_adds(loop, tile.warps) // products_of
    slots = len(loop) * tile.warps * 32 / pairs
    exponentials = sum(x.opcode.startswith("MUFU.EX2") for x in loop) * tile.warps * 32 / pairs
    matrix = next(x.opcode for x in loop if "MMA" in x.opcode)
    copied = sum(x.opcode.startswith("LDGSTS") * copy_width(x.opcode) for x in loop) * tile.warps * 32 / pairs
    clocks = (
        1024 * slots / 32 / SCHEDULERS, 1024 * exponentials / EXPONENTIALS, 1024 * products_of / MULTIPLY_ADDS,
        1024 * copied / L2_BYTES,
    )  # fmt: skip
    copies, loads = copies_ahead(loop), loads_ahead(loop)
    # The clocks that pass between: their part of a tile's, whose products and other instructions take turns.
    per_slot = (clocks[2] + max(clocks[:2])) * pairs / 1024 / len(loop)
    late = max(LATENCY - ahead * per_slot if ahead >= 0 else 0 for ahead in (copies, loads))
    return Reading(
        name, tile, triton.__version__, resources["registers"], resources["spills"], shared,
        blocks_an_sm(resources["registers"], shared, tile.warps), len(loop), pairs, slots, exponentials, matrix,
        copies, loads, copied, clocks, 1024 * max(0, late) / pairs,
    ), loop  # fmt: skip


def readings(
    kernel: str, head_size: int, tile: configs.Tile | None = None, features: frozenset[str] = frozenset(),
    dtype: str = "bf16",
) -> Iterator[tuple[Reading, list[Instruction]]]:  # fmt: skip
    """What a kernel compiles to with the table's tile, or another."""
    with choosing.forced({} if tile is None else {kernel: tile}):
        found = [x for x in launched(ARCH, dtype, head_size, head_size, features, kernel) if x.name == kernel]
    for launch in found:
        compiled = triton.compile(launch.source, target=TARGETS[ARCH], options=launch.options)
        products_of = head_size * PRODUCTS.get(kernel, 1)
        yield read(kernel, compiled.asm, compiled.metadata.shared, launch.tile, products_of)


def words(tile: configs.Tile) -> str:
    """As the tables of docs/kernels.md have it."""
    cap = f" <={tile.registers}" if tile.registers else ""
    return f"{tile.rows} x {tile.keys}, {tile.warps}w {tile.stages}s{cap}"


def line(reading: Reading) -> str:
    x = reading
    spills = f" {x.spills} SPILLS" if x.spills else ""
    clocks = "/".join(f"{clocks:.0f}" for clocks in x.clocks)
    return (
        f"{x.kernel:<15} {words(x.tile):<24} {x.registers:>3} regs{spills}, {x.shared // 1024:>3} KiB, "
        f"{x.blocks} blocks; "
        f"{x.loop} slots for {x.pairs} pairs, {x.slots:.2f} a pair, {x.bytes:.1f} B; ahead: copies {x.copies_ahead}, "
        f"loads {x.loads_ahead}; {x.matrix}; clocks of 1024 pairs {clocks} +{x.waits:.0f}: {x.overlapped:.0f} to "
        f"{x.in_turn:.0f}, {x.predicted:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", choices=sorted(configs.TILES[ARCH]))
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--feature", default="", help="softcap,sliding_window,sinks,alibi")
    parser.add_argument("--tile", action="append", help="rows,keys,warps,stages[,registers]; default the table's")
    parser.add_argument("--code", action="store_true", help="the main loop too")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tiles = [configs.Tile(*map(int, text.split(","))) for text in given.tile or []]
    features = frozenset(filter(None, given.feature.split(",")))
    for kernel in given.kernel or sorted(configs.TILES[ARCH]):
        for tile in tiles or [None]:
            for reading, loop in readings(kernel, given.head_size, tile, features, given.dtype):
                print(json.dumps(reading._asdict()) if given.json else line(reading), flush=True)
                if given.code:
                    print("\n".join(f"  {x.address:05x} {x.text}" for x in loop))


if __name__ == "__main__":
    main()
