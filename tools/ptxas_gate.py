"""Compares the registers and memory of every CUDA kernel on every architecture with a table in the repository.

    python tools/ptxas_gate.py            compiles csrc/cuda/*.cu and compares with tools/ptxas_baseline.json
    python tools/ptxas_gate.py --write    rewrites the table: do so if a change is worth its cost, and say why
    python tools/ptxas_gate.py --log LOG  reads the output of a build with `-Xptxas -v` instead of compiling
    python tools/ptxas_gate.py --wheel WHEEL     runs cuobjdump on the module in a wheel; compiles without cuobjdump
    python tools/ptxas_gate.py --objects FOLDER  keeps the compiled objects there, for tools/sass_gate.py

The gate fails if a kernel spills or uses local memory, if it needs more registers or shared memory than in the table,
or if the table and the sources have different kernels. Registers depend on the compiler: if nvcc has another version
than in the table, only spills and local memory are checked.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine_code

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tools" / "ptxas_baseline.json"
FLAGS = ["-std=c++20", "-O3", "-Xptxas", "-v"]
MUST_BE_ZERO = ("stack", "spill_stores", "spill_loads")  # bytes of local memory; spilled registers are on the stack
MUST_NOT_GROW = ("registers", "shared")
RESERVED = 1024  # bytes of shared memory for the system; cuobjdump counts them from Hopper on, ptxas does not

Costs = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> resource -> amount


def architectures() -> list[str]:
    """The architectures for which CMakeLists.txt builds machine code."""
    default = re.search(r'set\(NF4LORA_CUDA_ARCHS "([^"]*)"', (ROOT / "CMakeLists.txt").read_text())
    if default is None:
        raise SystemExit("ptxas_gate: CMakeLists.txt must set NF4LORA_CUDA_ARCHS, found no such line")
    return re.findall(r"(\w+)-real", default[1])


def compile_objects(wanted: list[str], folder: Path) -> str:
    """The output of ptxas for every kernel. The folder then holds the objects of these sources and no others."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.o"):
        stale.unlink()

    def compile_one(source: Path) -> str:
        command = ["nvcc", *FLAGS, *codes, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"ptxas_gate: {source.name} must compile, got\n{result.stderr}")
        return result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as several:
        return "".join(several.map(compile_one, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))))


def compile_log(wanted: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return compile_objects(wanted, Path(folder))


def nvcc_version() -> str:
    try:
        output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit("ptxas_gate: nvcc must be on PATH, found none; install the CUDA toolkit") from None
    return re.search(r"V([\d.]+)", output)[1]


def read_log(log: str) -> Costs:
    """The costs in the output of `nvcc -Xptxas -v`."""
    entries: list[tuple[str, str, dict[str, int]]] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for 'sm_(\w+)'", line):
            entries.append((match[1], match[2], {}))
        elif entries and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            entries[-1][2].update(zip(MUST_BE_ZERO, map(int, match.groups()), strict=True))
        elif entries and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            entries[-1][2].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return by_name(entries)


def read_resources(listing: str) -> Costs:
    """The costs in the output of `cuobjdump -res-usage`, which does not count spills; they are on the stack."""
    architecture, mangled, entries = "", "", []
    for line in listing.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            mangled = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ", line):
            registers, stack, shared, local = map(int, match.groups())
            if shared and int(architecture.rstrip("a")) >= 90:
                shared -= RESERVED
            entries.append((mangled, architecture, {"stack": stack + local, "registers": registers, "shared": shared}))
    return by_name(entries)


def by_name(entries: list[tuple[str, str, dict[str, int]]]) -> Costs:
    """The costs by short name of the kernel, from entries with mangled names."""
    costs: Costs = {}
    names = short_names([mangled for mangled, _, _ in entries])
    for (_, architecture, cost), name in zip(entries, names, strict=True):
        costs.setdefault(name, {})[architecture] = cost
    return costs


def short_names(mangled: list[str]) -> list[str]:
    plain = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [short_name(name) for name in plain.splitlines()]


def short_name(demangled: str) -> str:
    """`nf4_quantize_kernel<float>` of `void nf4lora::cuda::(anonymous namespace)::nf4_quantize_kernel<float>(...)`."""
    plain = demangled.replace("(anonymous namespace)::", "")  # its parentheses also stand among the arguments
    return re.search(r"(\w+(?:<.*?>)?)\([^()]*\)$", plain)[1]


def table_text(version: str, costs: Costs) -> str:
    """JSON with one line for each kernel and architecture, so that a change reads well in a diff."""
    kernels = []
    for kernel, by_architecture in sorted(costs.items()):
        lines = [f"   {json.dumps(a)}: {json.dumps(cost)}" for a, cost in sorted(by_architecture.items())]
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    return f'{{\n "nvcc": {json.dumps(version)},\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"


def compare(costs: Costs, table: Costs, same_compiler: bool) -> list[str]:
    """One line for each difference that is not allowed."""
    wrong = []
    for kernel, by_architecture in sorted(costs.items()):
        for architecture, cost in sorted(by_architecture.items()):
            where = f"{kernel} on {architecture}"
            wrong += [f"{where}: {cost[r]} bytes of {r}, must be 0" for r in MUST_BE_ZERO if cost.get(r)]
            if not same_compiler:
                continue
            known = table.get(kernel, {}).get(architecture)
            if known is None:
                wrong.append(f"{where}: not in the table")
                continue
            grown = [r for r in MUST_NOT_GROW if cost[r] > known[r]]
            wrong += [f"{where}: {r} grew from {known[r]} to {cost[r]}" for r in grown]
    if same_compiler:
        wrong += [f"{kernel}: in the table, but not in the sources" for kernel in sorted(table.keys() - costs.keys())]
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--log", type=Path, help="output of a build with -Xptxas -v, for all architectures")
    source.add_argument("--wheel", type=Path, help="wheel of nf4lora, instead of compiling")
    source.add_argument("--objects", type=Path, help="keep the objects in this folder")
    options = parser.parse_args(arguments)
    if options.write and options.wheel:
        parser.error("--write must compile, which counts spills: leave --wheel out")

    version = nvcc_version()
    if options.log:
        costs = read_log(options.log.read_text())
    elif options.wheel and machine_code.disassembler():
        costs = read_resources(machine_code.listing_of_wheel("-res-usage", options.wheel))
    elif options.objects:
        costs = read_log(compile_objects(architectures(), options.objects))
    else:
        costs = read_log(compile_log(architectures()))
    if not costs:
        raise SystemExit("ptxas_gate: no kernels found; a log is of a build with -Xptxas -v, a wheel of one with CUDA")
    if options.write:
        TABLE.write_text(table_text(version, costs))
    table = json.loads(TABLE.read_text())
    same_compiler = table["nvcc"] == version
    built = {architecture for by_architecture in costs.values() for architecture in by_architecture}
    wrong = [f"sm_{architecture}: not compiled for it" for architecture in architectures() if architecture not in built]
    wrong += compare(costs, table["kernels"], same_compiler)
    if not same_compiler:
        print(f"ptxas_gate: the table is of nvcc {table['nvcc']}, this is {version}: only local memory is checked")
    for line in wrong:
        print(f"ptxas_gate: {line}")
    if wrong:
        print("ptxas_gate: mend the kernel, or accept the cost: python tools/ptxas_gate.py --write")
        return 1
    print(f"ptxas_gate: {len(costs)} kernels on {len(built)} architectures are as the table says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
