"""Does a kernel copy uniform registers before they are written? ptxas 13.0 to 13.5 does it to coordinates of TMA loads.

    python -m benchmarks.gpu.stale [FILE.ptx]

The load then takes what the kernel before left in those registers: an illegal instruction at best. `ptxas_stale.ptx`,
the default, is a kernel that shows it. Looked for, in machine code, is the copy: a UMOV without a predicate, of a
register that nothing earlier in its block has written, nor every path to the block without a predicate. Needs no GPU.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.toolkit import cuda_root, disassembled
from models.commands.cli import run_cli

EXAMPLE = Path(__file__).with_name("ptxas_stale.ptx")
_ENTRY = "entry"
_LABEL = re.compile(r"\s*(\.L_\w+):")
_CODE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_UNIFORM = re.compile(r"\bUR(\d+)")
_NO_RESULT = ("UISETP", "UPLOP3", "USETMAXREG", "UTMALDG", "UTMASTG", "UTMACCTL", "UTMACMDFLUSH", "UBLKCP", "UCGABAR")
"""Of what works on uniform registers, what writes none."""


def blocks(sass: str) -> dict[str, list[str]]:
    """Instructions by label, in the order of the code."""
    found: dict[str, list[str]] = {_ENTRY: []}
    name = _ENTRY
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            name = label[1]
            found.setdefault(name, [])
        elif code := _CODE.search(line):
            found[name].append(code[1])
    return found


def written(instruction: str) -> set[int]:
    """Uniform registers that an instruction writes, whatever its predicate."""
    operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    uniform = operation.startswith("U") or operation.split(".")[0] in ("R2UR", "S2UR", "LDCU")
    if not uniform or operation.startswith(_NO_RESULT):
        return set()
    first = _UNIFORM.search(operands.split(",")[0])
    if first is None:
        return set()
    wide = 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
    return set(range(int(first[1]), int(first[1]) + wide))


def _exits(name: str, following: str | None, code: list[str], known: set[int]) -> list[tuple[str, frozenset[int]]]:
    """(block, registers written for certain) of every way out of a block."""
    ways, now = [], set(known)
    for instruction in code:
        if "BRA" in instruction and (target := _TARGET.search(instruction)):
            ways.append((target[1], frozenset(now)))
        if not instruction.startswith("@"):
            now |= written(instruction)
            if instruction.startswith(("EXIT", "BRA ")) and not re.search(r"BRA\S*\s+!?U?P\d", instruction):
                return ways
    return ways if following is None else [*ways, (following, frozenset(now))]


def stale_copies(sass: str) -> list[str]:
    """The copies of uniform registers that nothing has written, of nvdisasm's text of one kernel."""
    code = blocks(sass)
    names = list(code)
    after = dict(zip(names, [*names[1:], None], strict=True))
    known: dict[str, frozenset[int]] = {_ENTRY: frozenset()}
    todo = [_ENTRY]
    while todo:
        name = todo.pop()
        for target, certain in _exits(name, after[name], code[name], set(known[name])):
            met = known[target] & certain if target in known else certain
            if target in code and met != known.get(target):
                known[target] = met
                todo.append(target)
    found = []
    for name in known:
        here = set(known[name])
        for instruction in code[name]:
            source = re.match(r"UMOV UR\d+, UR(\d+)", instruction)
            if source and int(source[1]) not in here:
                found.append(f"{name}: {instruction}")
            here |= written(instruction)
    return found


def main(file: Annotated[Path, typer.Argument(help="PTX of one kernel", exists=True)] = EXAMPLE) -> None:
    """Compiles PTX for a Hopper and prints the copies of registers that nothing has written."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernel.cubin"
        command = [str(cuda_root() / "bin" / "ptxas"), "-arch=sm_90a", str(file), "-o", str(made)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ValueError(f"{file}: ptxas: {ended.stderr.strip()[:500]}")
        found = stale_copies(disassembled(made))
    print(f"{file.name}: {len(found)} copies of uniform registers that nothing has written")
    print("\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    run_cli(main)
