"""Compile the Triton kernels for sm_80 and sm_90, without a GPU, and report the resources that they use.

    python benchmarks/compiled_kernels.py [--features 64] [--kernel forward] [--json FILE]

Prints one row of a Markdown table for each kernel, head size, dtype, case, target and kind of gates: registers per
thread, bytes that a thread spills (its stack and local memory), shared memory per program, the number of resident warps
that these allow on an sm_90 multiprocessor, and instructions per pair. Attention is causal, with three query heads per
key/value head. The installed Triton compiles with its bundled ptxas, and ``cuobjdump`` is bundled too.

Instructions per (query, key) pair: the machine code (SASS) is searched for loops that contain matrix products, where a
loop is a backward branch and everything between it and its target. The shortest such loop runs over the tiles that need
no mask, where nearly all time is spent. The figure is its number of instructions, without NOPs and each counted once
regardless of its unit's throughput, times the threads of a program, divided by the tile's pairs: 915 instructions, 256
threads and 128 x 64 pairs give 28.6. So a figure of 1 means one thread instruction per pair, of which a multiprocessor
issues 128 per cycle. Work done once per tile or once per row is included.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.ops import triton_kernels
from gossamer.ops.triton import FUSED_FEATURES, Kernel, launch

KERNELS: tuple[Kernel, ...] = ("forward", "query_gradients", "key_value_gradients", "fused_gradients", "write_links")
POINTERS = {
    "BIAS": "*fp32", "NOISE": "*i64", "REAL": "*u8", "EXTENTS": "*i32", "LOG_SUM_EXP": "*fp32", "EXPECTED": "*fp32",
    "OPENED": "*i64", "D_EXPECTED": "*fp32", "DELTA": "*fp32", "HIGHEST": "*fp32", "NORMALISER": "*fp32",
    "PRICE": "*fp32", "CLOSING": "*fp32", "D_BIAS": "*fp32", "STARTS": "*i64", "PAIRS": "*i32", "WEIGHTS": "*fp32",
}  # fmt: skip
CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "padding": {"HAS_EXTENTS": True, "HAS_REAL": True},
    "window": {"WINDOW": True},
    "softcap": {"SOFTCAP": True},
}
DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Report:
    """The resources that one compiled kernel uses.

    Attributes:
        dtype, case: of q, k and v; what the mask or logits have in addition to causality.
        gates: ``sampled``, ``hard`` (training with hard gates) or ``evaluation`` (no expected links).
        registers: per thread.
        shared_bytes: per program.
        spilled_bytes: a thread's stack and local memory.
        warps: number of resident warps on one multiprocessor of an H100.
        instructions_per_pair: instructions of one thread in the inner loop, divided by the pairs per thread.
    """

    kernel: str
    features: int
    dtype: str
    case: str
    target: str
    gates: str
    tile: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    warps: int
    instructions_per_pair: float


def resident_warps(registers: int, shared_bytes: int, warps: int) -> int:
    """Resident warps on an sm_90 multiprocessor, which has 65,536 registers, 228 KiB of shared memory and 64 warps."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = 228 * 1024 // (shared_bytes + 1024)
    return warps * min(by_registers, by_memory, 64 // warps)


def compile_kernel(
    kernel: Kernel, features: int, dtype: str, case: str, capability: int, gates: str, count: bool = True
) -> Report:
    """Compile one kernel and analyse its machine code."""
    function = getattr(triton_kernels, "key_value_gradients" if kernel == "fused_gradients" else kernel)
    sizes = launch(kernel, features, 4 if dtype == "float32" else 2, 4096, narrow=case != "plain")
    padded = max(16, triton.next_power_of_2(features))
    constants = {
        "MASK": None, "GROUPS": 3, "D": features, "DV": features, "PD": padded,
        "PDV": padded, "M": sizes.M, "N": sizes.N, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False,
        "FAR": False, "HAS_EXTENTS": False, "HAS_REAL": False, "HAS_MASK": False, "PRICED": True,
        "RESCALE": dtype == "float16", "SAMPLE": gates == "sampled", "EXPECT": gates != "evaluation",
        "COUNT": count, "VALUES": True, "FUSED": kernel == "fused_gradients", "PRECISION": "tf32x3",
        "mask_batch": 0, "mask_row": 0, "mask_key": 0, **CASES[case],
    }  # fmt: skip
    if not constants["HAS_EXTENTS"]:
        constants |= {"REAL": None, "EXTENTS": None}
    if kernel == "key_value_gradients":
        constants |= {"D_Q": None, "D_BIAS": None}
    if not count:
        constants["OPENED"] = None
    if gates != "sampled":
        constants["NOISE"] = None
    if gates == "evaluation":
        constants["EXPECTED"] = None
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.isupper():
            fused = kernel == "fused_gradients" and name == "D_Q"
            signature[name] = "*fp32" if fused else POINTERS.get(name, DTYPES[dtype])
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        if name.isupper() or name.endswith(("_batch", "_head", "_row")):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in sizes.options().items() if name not in "MN"},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("cuobjdump", "-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    pairs = sizes.M * sizes.N / (32 * sizes.num_warps)
    return Report(
        kernel,
        features,
        dtype,
        case,
        f"sm_{capability}",
        gates,
        f"{sizes.M}x{sizes.N}, {sizes.num_warps} warps, {sizes.num_stages} stages",
        found["REG"],
        compiled.metadata.shared,
        found["STACK"] + found["LOCAL"],
        resident_warps(found["REG"], compiled.metadata.shared, sizes.num_warps),
        round(inner_loop(code) / pairs, 1),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def inner_loop(code: str) -> int:
    """Number of instructions, without NOPs, in the shortest loop that contains matrix products."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            body = [other for place, other in instructions if int(branch[1], 16) <= place <= address]
            if any("MMA" in other for other in body):
                loops.append(sum("NOP" not in other for other in body))
    return min(loops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="*", default=[32, 64, 80, 128, 256])
    parser.add_argument("--kernel", choices=KERNELS, nargs="*", default=KERNELS)
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=["bfloat16"])
    parser.add_argument("--case", choices=CASES, nargs="*", default=["plain"])
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--gates", nargs="*", default=["sampled", "hard", "evaluation"])
    parser.add_argument("--uncounted", action="store_true", help="without the count of hard open links")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    reports = []
    print(f"Triton {triton.__version__}\n")
    columns = [field.name for field in fields(Report)]
    print("|", " | ".join(name.replace("_", " ") for name in columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for kernel in arguments.kernel:
        kinds = {"forward": ["sampled", "hard", "evaluation"], "write_links": ["evaluation"]}
        for gates in kinds.get(kernel, ["sampled", "hard"]):
            if gates not in arguments.gates:
                continue
            for rest in product(arguments.features, arguments.dtype, arguments.case, arguments.capability):
                if kernel == "fused_gradients" and rest[0] > FUSED_FEATURES:
                    continue
                report = compile_kernel(kernel, *rest, gates, not arguments.uncounted)
                reports.append(report)
                print("|", " | ".join(str(value) for value in asdict(report).values()), "|", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))


if __name__ == "__main__":
    main()
