"""Compare gated attention with PyTorch's scaled_dot_product_attention: time and memory, in one run.

    python benchmarks/attention.py [--dtype float32] [--tokens 512 1024] [--record FILE]

Runs on a GPU if there is one, else on the CPU. For each length it times the evaluation forward pass (hard gates, no
counts, no gradient) and the training forward and backward passes (sampled gates, expected links), all causal, and
reports the ratio to scaled_dot_product_attention in the same run. The implementations alternate call by call and their
medians are compared, so that a slow moment affects all of them.

``flex`` implements evaluation with FlexAttention: one pass for the softmax's denominator and one with closed gates at
-inf, rescaled by the difference of their log-sum-exps. It has no training phases. On a CPU torch cannot compile a
FlexAttention that returns log-sum-exps, so it runs there as "flex, eager", with memory quadratic in the length.

On a CPU all implementations keep freed memory (glibc's mallopt): otherwise page faults of the peer's buffers account
for much of its time and the ratio flatters the op. On a GPU the peer is pinned to its flash backend.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from gossamer import gated_attention
from gossamer.training.malloc import keep_freed_memory

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PHASES = ("evaluation", "forward", "backward", "forward+backward")


def inputs(arguments: argparse.Namespace, tokens: int) -> list[torch.Tensor]:
    """q, k, v and the gate bias; the bias opens about as many gates as a sparse model has open."""
    dtype = getattr(torch, arguments.dtype)
    shapes = [(arguments.batch, heads, tokens, arguments.features) for heads in (arguments.heads, *2 * [arguments.kv])]
    tensors = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*tensors, torch.full((arguments.heads,), -4.0, device=DEVICE))]


def contenders(names: list[str]) -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]]:
    """Functions of (q, k, v, bias, evaluation) that return the output and the expected open links."""

    def sdpa(q, k, v, bias, evaluation):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]), None

    def gated(implementation):
        def call(q, k, v, bias, evaluation):
            result = gated_attention(
                q, k, v, bias, sample=not evaluation, seed=1, expect=not evaluation, count=False,
                implementation=implementation,
            )  # fmt: skip
            return result.output, result.expected_open

        return call

    found = {"sdpa": sdpa, **{name: gated(name) for name in ("naive", "chunked")}}
    if GPU and find_spec("triton"):
        found |= {name: gated(name) for name in ("triton", "triton_fused")}
    found["flex" if GPU else "flex, eager"] = flex
    if GPU:
        found["naive, compiled"] = torch.compile(gated("naive"))
    return {name: found[name] for name in found if name in names or name == "sdpa"}


def flex(q, k, v, bias, evaluation):
    """Hard gates by FlexAttention: A P v = exp(lse of the open links - lse of all) * (softmax over the open) v."""
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))  # on a CPU torch refuses inputs that require gradients
    attention = compiled_flex() if GPU else flex_attention
    options = {
        "block_mask": causal_blocks(q.shape[2]),
        "enable_gqa": q.shape[1] != k.shape[1],
        "return_aux": AuxRequest(lse=True),
    }

    def gated(score, batch, head, query, key):
        return torch.where(score + bias[head] > 0, score, -math.inf)

    _, every = attention(q, k, v, **options)
    output, opened = attention(q, k, v, score_mod=gated, **options)
    share = torch.where(opened.lse == -math.inf, 0.0, (opened.lse - every.lse).exp())
    return (output * share[..., None]).to(q.dtype), None


@cache
def compiled_flex() -> Callable:
    return torch.compile(flex_attention)


@cache
def causal_blocks(tokens: int) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=DEVICE)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> tuple[float, object]:
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


def measure(arguments: argparse.Namespace, tokens: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by contender and phase."""
    names = [name for name in arguments.implementations if tokens <= arguments.quadratic_up_to
             or not (name.startswith("naive") or name == "flex, eager")]  # fmt: skip
    functions = contenders(names)
    times = {name: {phase: [] for phase in (PHASES[:1] if name.startswith("flex") else PHASES)} for name in functions}
    tensors = inputs(arguments, tokens)
    d_output = torch.randn_like(tensors[0])
    price = torch.full((arguments.batch, arguments.heads, tokens), 1e-6, device=DEVICE)
    for repeat in range(arguments.warm_up + arguments.repeats):
        for name, function in functions.items():
            with torch.no_grad():
                evaluation, _ = timed(lambda function=function: function(*tensors, True))
            if name.startswith("flex"):
                if repeat >= arguments.warm_up:
                    times[name]["evaluation"].append(1e3 * evaluation)
                continue
            forward, (output, expected) = timed(lambda function=function: function(*tensors, False))
            ends = [output] if expected is None else [output, expected]
            starts = [d_output] if expected is None else [d_output, price.to(expected.dtype)]
            backward, _ = timed(
                lambda ends=ends, starts=starts: torch.autograd.grad(ends, tensors[: 3 + (len(ends) > 1)], starts)
            )
            if repeat >= arguments.warm_up:
                for phase, seconds in zip(PHASES, (evaluation, forward, backward, forward + backward), strict=True):
                    times[name][phase].append(1e3 * seconds)
    return {name: {phase: statistics.median(rows) for phase, rows in of.items()} for name, of in times.items()}


def product_floor(arguments: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Milliseconds for the matrix products alone, by phase: 2 forward and 5 backward, over the causal pairs.

    Based on the measured rate of a product of 64 queries with all keys in all heads at once, in the peer's dtype.
    """
    streams, d = arguments.batch * arguments.heads, arguments.features
    dtype = getattr(torch, arguments.dtype)
    rows = torch.randn(streams, 64, d, device=DEVICE, dtype=dtype)
    columns = torch.randn(streams, d, tokens, device=DEVICE, dtype=dtype)
    seconds = statistics.median(timed(lambda: rows @ columns)[0] for _ in range(arguments.repeats + arguments.warm_up))
    one = 1e3 * seconds * (tokens * (tokens + 1) / 2) / (64 * tokens)
    return {"evaluation": 2 * one, "forward": 2 * one, "backward": 5 * one, "forward+backward": 7 * one}


def peak_megabytes(arguments: argparse.Namespace, name: str, tokens: int) -> float:
    """Memory of one forward and backward pass beyond its inputs and gradients, measured in a separate process."""
    command = [sys.executable, __file__, "--one-pass", name, "--tokens", str(tokens), "--dtype", arguments.dtype]
    for option in ("batch", "heads", "kv", "features"):
        command += [f"--{option}", str(getattr(arguments, option))]
    # Large blocks are mapped individually, so that they are returned to the system as soon as they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


def growth(peaks: dict[int, float]) -> float:
    """The exponent p of the least-squares fit peak = c T^p."""
    x, y = ([math.log(value) for value in values] for values in (peaks.keys(), peaks.values()))
    return statistics.linear_regression(x, y).slope


def one_pass(arguments: argparse.Namespace) -> None:
    """Print the peak memory of one pass, after two passes at a small length that load libraries and compile code."""
    function = contenders([arguments.one_pass])[arguments.one_pass]

    def work(tokens: int) -> float:
        tensors = inputs(arguments, tokens)
        for x in tensors:
            x.grad = torch.zeros_like(x)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _resident("VmRSS")
        output, expected = function(*tensors, False)
        (output.float().sum() + (0 if expected is None else expected.sum())).backward()
        after = torch.cuda.max_memory_allocated() if GPU else _resident("VmHWM")
        return (after - before) / 2**20

    work(256)
    work(256)
    print(work(arguments.tokens[0]))


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def record(arguments: argparse.Namespace) -> dict[str, object]:
    """The date, device, versions and arguments of the measurement."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if GPU else f"{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     **({"triton": __import__("triton").__version__} if find_spec("triton") else {})},
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192] if GPU else [256, 512, 1024])
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32 if GPU else 9)
    parser.add_argument("--kv", type=int, default=32 if GPU else 9, help="key/value heads")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--implementations", nargs="*", default=[
        "naive", "chunked", "triton", "triton_fused", "naive, compiled", "flex", "flex, eager"
    ])  # fmt: skip
    parser.add_argument("--quadratic-up-to", type=int, default=2048, help="longest T for the plain op")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory", type=int, nargs="*", default=[], help="lengths at which to measure peak memory")
    parser.add_argument("--record", type=Path, help="write the figures here")
    parser.add_argument("--one-pass", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.one_pass:
        return one_pass(arguments)
    keep_freed_memory()
    result = record(arguments)
    print(result["device"], result["versions"], arguments.dtype, flush=True)
    rows: dict[int, dict[str, dict[str, float]]] = {}
    pinned = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with pinned:
        for tokens in arguments.tokens:
            rows[tokens] = {**measure(arguments, tokens), "products alone": product_floor(arguments, tokens)}
            for name, of in rows[tokens].items():
                print(f"T={tokens:<6} {name:16}", *(
                    f"{phase} {of[phase]:8.2f} ms ({of[phase] / rows[tokens]['sdpa'][phase]:5.2f})" for phase in of
                ), flush=True)  # fmt: skip
    result["milliseconds"] = rows
    if arguments.memory:
        result["peak_megabytes"] = {}
        for name in (x for x in contenders(arguments.implementations) if "," not in x and x != "flex"):
            peaks = {}
            for tokens in arguments.memory:
                if not name.startswith("naive") or tokens <= arguments.quadratic_up_to:
                    peaks[tokens] = peak_megabytes(arguments, name, tokens)
            result["peak_megabytes"][name] = peaks
            each = (f"T={tokens} {peak:.0f}" for tokens, peak in peaks.items())
            print(f"peak MB, {name}:", *each, f"~ T^{growth(peaks):.2f}", flush=True)
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
