"""Checks that the machine code of the CUDA kernels has the instructions below on every architecture.

    python tools/sass_gate.py                   compiles csrc/cuda/*.cu and disassembles it
    python tools/sass_gate.py --wheel WHEEL     takes the module in a wheel, which has compiled them
    python tools/sass_gate.py --objects FOLDER  takes the objects that `ptxas_gate.py --objects FOLDER` left
    python tools/sass_gate.py --counts          prints every count
    python tools/sass_gate.py --require         fails if no disassembler is found; without this option it passes

The compiler may replace the tensor cores, wide loads or asynchronous copies of a source by other instructions.
machine_code.py finds the disassembler.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import machine_code
import ptxas_gate

TENSOR_CORES = {"HMMA": "products are made by tensor cores"}
ASYNCHRONOUS_TILES = {
    "LDSM": "fragments come from shared memory by ldmatrix",
    "LDGSTS": "tiles go to shared memory by asynchronous copies, past the registers",
}
DEMANDS: dict[str, dict[str, str]] = {  # kernel -> instruction -> why it must be there
    "expand_parts_kernel": TENSOR_CORES | {"LDSM": ASYNCHRONOUS_TILES["LDSM"]},
    "lora_few_kernel": TENSOR_CORES | {"LDG.E.128": "operands are streamed 16 bytes at a time"},
    "lora_gemm_kernel": TENSOR_CORES | ASYNCHRONOUS_TILES | {"PRMT": "codes are looked up by byte permutation"},
    "tall_skinny_kernel": TENSOR_CORES | ASYNCHRONOUS_TILES,
}
LOCAL_MEMORY = ("LDL", "STL")  # must be in no kernel: its values must fit into registers
COUNTED = ("HMMA", "LDSM", "LDGSTS", "PRMT", "LDG.E.128", *LOCAL_MEMORY)

Counts = dict[str, dict[str, Counter[str]]]  # kernel -> architecture -> instruction -> how often


def read_listing(listing: str) -> Counts:
    """The counts in the output of `cuobjdump -sass`."""
    architecture, entries = "", []
    for line in listing.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            entries.append((match[1], architecture, Counter()))
        elif entries and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][\w.]*)", line)):
            entries[-1][2].update(name for name in COUNTED if is_a(match[1], name))
    counts: Counts = {}
    names = ptxas_gate.short_names([mangled for mangled, _, _ in entries])
    for (_, of, count), name in zip(entries, names, strict=True):
        counts.setdefault(name, {})[of] = count
    return counts


def counts_of(folder: Path) -> Counts:
    """The counts in the objects of a folder."""
    return read_listing(machine_code.listing("-sass", sorted(folder.glob("*.o"))))


def is_a(instruction: str, name: str) -> bool:
    """Whether an instruction has all parts of a name; LDG.E.NA.128.CONSTANT is an LDG.E.128 with cache hints."""
    parts, wanted = instruction.split("."), name.split(".")
    return parts[0] == wanted[0] and set(wanted) <= set(parts)


def compare(counts: Counts, demands: dict[str, dict[str, str]], architectures: list[str]) -> list[str]:
    """One line for each instruction that is missing or not allowed."""
    wrong = []
    for kernel, by_architecture in sorted(counts.items()):
        needed = demands.get(kernel.split("<")[0], {})
        wrong += [f"{kernel} on {a}: not in the machine code" for a in architectures if a not in by_architecture]
        for architecture, count in sorted(by_architecture.items()):
            where = f"{kernel} on {architecture}"
            wrong += [f"{where}: {count[name]} {name}, must be 0: local memory" for name in LOCAL_MEMORY if count[name]]
            wrong += [f"{where}: no {name}, but {why}" for name, why in needed.items() if not count[name]]
    kernels = {kernel.split("<")[0] for kernel in counts}
    return wrong + [f"{kernel}: demanded, but not in the sources" for kernel in sorted(demands.keys() - kernels)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--objects", type=Path, help="folder of objects, instead of compiling")
    source.add_argument("--wheel", type=Path, help="wheel of nf4lora, instead of compiling")
    parser.add_argument("--counts", action="store_true", help="print every count")
    parser.add_argument("--require", action="store_true", help="fail where no disassembler is found")
    options = parser.parse_args(arguments)

    if machine_code.disassembler() is None:
        print("sass_gate: no cuobjdump with nvdisasm on PATH or in this Python: not counted")
        return int(options.require)
    architectures = ptxas_gate.architectures()
    if options.wheel:
        counts = read_listing(machine_code.listing_of_wheel("-sass", options.wheel))
    elif options.objects:
        counts = counts_of(options.objects)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            ptxas_gate.compile_objects(architectures, Path(temporary))
            counts = counts_of(Path(temporary))
    if options.counts:
        for kernel, by_architecture in sorted(counts.items()):
            for architecture, count in sorted(by_architecture.items()):
                print(f"{kernel} on {architecture}:", *(f"{name} {count[name]}" for name in COUNTED))
    wrong = compare(counts, DEMANDS, architectures)
    for line in wrong:
        print(f"sass_gate: {line}")
    if wrong:
        return 1
    print(f"sass_gate: {len(counts)} kernels on {len(architectures)} architectures hold the instructions demanded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
