"""Compile every Triton kernel and every launch configuration ahead of time, without a GPU.

Each op is called on tensors without data at the shapes of real supernets, and what it would launch is compiled instead:
the signature, the constants and the alignment hints are those of a real launch. Prints one row a kernel, and writes
``bench/results/triton_aot.json`` with registers, spilled bytes and shared memory of each.

    python bench/triton_aot.py [--arch 80 90] [--dtype float32 ...] [--kernel mixed_sum ...] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import header, write

RESULTS = Path(__file__).parent / "results" / "triton_aot.json"
CONFIGS = Path(__file__).parents[1] / "kernels" / "configs"
OPTIONS = ("num_warps", "num_stages", "maxnreg")
DTYPES = ("float32", "float16", "bfloat16", "float64")
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """What one call of ``_launch.launch`` asks for, in values that travel to another process."""

    module: str
    kernel: str
    types: tuple[tuple[str, Any], ...]  # by argument
    aligned: tuple[tuple[int, ...], ...]  # paths of the arguments that divide by 16
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]  # for the compiler


def maps(count: int, shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> list[Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    return [torch.empty(shape, dtype=dtype, device="meta", memory_format=layout) for _ in range(count)]


def call_mixed_sum(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import mixed_sum as op

    small = [] if quick else [(8, (16, 64, 8, 8)), (8, (3, 5, 7, 9)), (64, (64, 16, 32, 32))]
    for count, shape in [(8, (64, 16, 32, 32)), *small]:
        xs, w = maps(count, shape, dtype), torch.empty(count, device="meta")
        op.mixed_sum_fwd(xs, w)
        op.mixed_sum_bwd(xs[0], xs, w)
        op.mixed_sum_bwd_xs(xs[0], w)


def call_path_dropout(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import path_dropout as op

    more = [] if quick else [(7, (16, 64, 8, 8)), (7, (3, 5, 7, 9)), (1, (96, 36, 32, 32)), (64, (64, 16, 32, 32))]
    for count, shape in [(7, (64, 16, 32, 32)), *more]:
        for kind in (torch.bool,) if quick else (torch.bool, torch.float32):
            mask = torch.empty((2, count), dtype=kind, device="meta")
            op.path_dropout_fwd(maps(count, shape, dtype), mask)
            op.path_dropout_bwd(maps(1, shape, dtype)[0], mask)


def call_partial_shuffle(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import partial_shuffle as op

    def one(batch: int, total: int, k: int, side: int, stride: int, subset: bool, last: bool) -> None:
        count, out = total // k, -(-side // stride)
        x = maps(1, (batch, total, side, side), dtype, last)[0]
        mixed = maps(8, (batch, count, out, out), dtype, last)
        bypass = x if subset else x[:, count:]
        channels = torch.empty(count, dtype=torch.int64, device="meta") if subset else None
        w = torch.empty(8, device="meta")
        g = op.partial_shuffle_fwd(mixed, w, bypass, channels, stride)
        pooled = bypass if stride == 2 else None
        op.partial_shuffle_bwd(g, mixed, w, pooled, channels, True)
        op.partial_shuffle_bwd_frozen(g, w, pooled, channels, count, True)
        op.partial_shuffle_fwd(mixed[:1], None, bypass, channels, stride)

    if quick:
        return one(256, 16, 4, 32, 2, False, False)
    for stride in (1, 2):
        one(64, 64, 4, 8, stride, False, False)
        one(3, 6, 2, 7, stride, False, False)
        for subset in (False, True):
            for last in (False, True):
                one(256, 16, 4, 32, stride, subset, last)


def call_gumbel_softmax(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import gumbel_softmax as op

    seed = torch.empty((), dtype=torch.int64, device="meta")
    for shape in ((28, 8),) if quick else ((28, 8), (7, 5), (64, 1000), (2, 8000)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        for where in ((None, None),) if quick else ((None, None), (seed, torch.empty((), device="meta"))):
            op.gumbel_softmax_fwd(x, 1 << 40, 1.0, *where, False)
            op.gumbel_softmax_fwd(x, 1 << 40, 1.0, *where, True)
            op.gumbel_softmax_bwd(x, x, 7, 0.5, *where, None)


def call_norm_mixed_sum(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import norm_mixed_sum as op

    more = (
        [] if quick else [(7, 1, (64, 64, 8, 8)), (7, 1, (3, 5, 7, 9)), (7, 1, (3, 1, 5, 5)), (64, 0, (64, 16, 32, 32))]
    )
    for count, extra, shape in [(7, 1, (64, 16, 32, 32)), *more]:
        for last in (False,) if quick else (False, True):
            g, *ys = maps(count + 1, shape, dtype, last)
            plain, w = maps(extra, shape, dtype, last), torch.empty(count + extra, device="meta")
            _, mean, var = op.norm_mixed_sum_fwd(ys, plain, w, 1e-5)
            op.norm_mixed_sum_bwd(g, ys, plain, w, mean, var, 1e-5, True)
            op.norm_mixed_sum_bwd_maps(g, [], w, mean, var, 1e-5, False)


def call_depthwise_bank(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import depthwise_bank as op

    def one(batch: int, channels: int, side: int, stride: int, last: bool) -> None:
        x = maps(1, (batch, channels, side, side), dtype, last)[0]
        ws = [torch.empty((channels, 1, k, k), dtype=dtype, device="meta") for k in (3, 5, 3, 5)]
        rest = ((1, 1, 2, 2), stride, True, True, True)
        ys = op.depthwise_bank_fwd(x, ws, *rest)
        op.depthwise_bank_bwd(ys, x, ws, *rest, True, True)

    one(64, 16, 32, 1, False)
    if not quick:
        one(64, 16, 32, 2, True)
        one(64, 64, 8, 1, False)


def stage_maps(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Maps [B, H, W, C] of the engine's stages."""
    return [torch.empty(shape, dtype=dtype, device="meta") for _ in range(count)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of what is no map: weights, coefficients, statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_node_sum(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import node_sum as op

    for shape in [(64, 32, 32, 16), *([] if quick else [(64, 8, 8, 64)])]:
        nodes = torch.empty((*shape[:3], 4 * shape[3]), dtype=dtype, device="meta").split(shape[3], dim=-1)
        for count in (7,) if quick else (1, 7):
            terms = [nodes[0], *stage_maps(count - 1, shape, dtype)]
            coef = torch.empty(count, 2, shape[3], dtype=wide(dtype), device="meta")
            for accumulate in (False, True):
                op.node_sum(nodes[1], terms, coef, accumulate)
        for edges in (1,) if quick else (1, 4):
            op.node_dots(nodes[:1] * 7 * edges, terms * edges, coef[:, 0].repeat(edges, 1))


def call_conv_stage(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import conv_stage as op

    def one(xs: list[Tensor], norms: bool, parts: list[int], sides: list[int], outputs: int, stride: int) -> None:
        channels = xs[0].shape[-1]
        like = {"dtype": wide(dtype), "device": "meta"}
        depthwise = [torch.empty((channels, 1, k, k) if k else 0, **like) for k in sides]
        pointwise = [torch.empty((outputs, channels, 1, 1), **like) for _ in sides]
        stats = torch.empty((len(xs), 2, channels), **like) if norms else None
        given = (xs, stats, parts, depthwise, pointwise, stride)
        z, _ = op.conv_stage_fwd(*given, True)
        zs, coef = list(z), torch.empty((len(z), 4, z.shape[-1]), **like)
        op.conv_stage_bwd(zs, zs, coef, *given, None if norms else xs[0], True, True)

    edge = [(3, 1), (5, 1), (3, 2), (5, 2)]  # sides and dilations of the candidates of an edge
    for shape in [(64, 32, 32, 16), *([] if quick else [(64, 8, 8, 64)])]:
        for edges in (1,) if quick else (1, 4):
            branches = edge * edges
            parts = [n for output, (_, d) in enumerate(branches) for n in (0, output, 0, d, 0)]
            for stride in (1,) if quick else (1, 2):
                sides = [k for k, _ in branches]
                one(stage_maps(1, shape, dtype), False, parts, sides, shape[3], stride)
            second = [n for output in range(2 * edges) for n in (output, output, 0, 1, 0)]
            one(stage_maps(2 * edges, shape, dtype), True, second, [3, 5] * edges, shape[3], 1)
        if not quick:
            one(stage_maps(1, (64, 32, 32, 3), dtype), False, [0, 0, 0, 1, 0], [0], shape[3], 1)
            one(stage_maps(1, (*shape[:3], 4 * shape[3]), dtype), False, [0, 0, 0, 1, 0], [0], shape[3], 1)


def call_pool_stage(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import pool_stage as op

    for shape in [(64, 32, 32, 16), *([] if quick else [(64, 8, 8, 64)])]:
        for stride in (1,) if quick else (1, 2):
            (x,) = stage_maps(1, shape, dtype)
            pooled, _ = op.pool_stage_fwd(x, stride, True)
            for count in (4,) if quick else (1, 4):
                scales, coef = (torch.empty((n, 3, shape[3]), dtype=wide(dtype), device="meta") for n in (count, 2))
                op.pool_stage_bwd(x, [pooled[0]] * count, scales, coef, stride, x)


def call_partial_join(dtype: torch.dtype, quick: bool) -> None:
    from fastnas.kernels import partial_join as op

    for shape in [(256, 32, 32, 16), *([] if quick else [(64, 8, 8, 64)])]:
        channels, k = shape[3], 4
        (x,) = stage_maps(1, shape, dtype)
        for stride in (2,) if quick else (1, 2):
            size = (shape[0], -(-shape[1] // stride), -(-shape[2] // stride))
            (mixed,) = stage_maps(1, (*size, channels // k), dtype)
            (d_mixed,) = stage_maps(1, (*shape[:3], channels // k), dtype)
            for later in (3,) if quick else (0, 3):
                states = [x, x, *stage_maps(later, (*size, channels), dtype)]
                betas = torch.empty(len(states), dtype=wide(dtype), device="meta")
                (out,) = stage_maps(1, (*size, channels), dtype)
                strides = [stride, stride, *[1] * later]
                op.partial_join(out, mixed, states, strides, betas, k)
                op.partial_join_bwd(out, states, strides, k)
            op.partial_join_dx(x, [out] * 4, betas, stride, k, d_mixed, x)


OPS: dict[str, Callable[[torch.dtype, bool], None]] = {
    "mixed_sum": call_mixed_sum,
    "path_dropout": call_path_dropout,
    "partial_shuffle": call_partial_shuffle,
    "gumbel_softmax": call_gumbel_softmax,
    "norm_mixed_sum": call_norm_mixed_sum,
    "depthwise_bank": call_depthwise_bank,
    "node_sum": call_node_sum,
    "conv_stage": call_conv_stage,
    "pool_stage": call_pool_stage,
    "partial_join": call_partial_join,
}


def launches(ops: list[str], dtypes: list[str], quick: bool) -> list[Launch]:
    """Everything that the ops launch under every table of ``kernels/configs`` that a GPU can use, once each."""
    from fastnas.kernels import _launch

    found: dict[Launch, None] = {}
    launch, name = _launch.launch, _launch._device_name
    modules = [__import__(f"fastnas.kernels.{op}", fromlist=[op]) for op in ops] + [_launch]

    def record(device: torch.device, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        found[_seen(kernel, args, constants)] = None

    try:
        for module in modules:
            module.launch = record
        for table in sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem != "interpreter"):
            _launch._device_name = lambda device, table=table: table
            for op in ops:
                for dtype in dtypes:
                    # float16 takes the paths of bfloat16, and float64 is there to check the others against.
                    OPS[op](getattr(torch, dtype), quick or dtype in ("float16", "float64"))
    finally:
        _launch._device_name = name
        for module in modules:
            module.launch = launch
    return list(found)


def _seen(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types: list[tuple[str, Any]] = []
    aligned: list[tuple[int, ...]] = []
    folded: dict[str, Any] = {name: v if isinstance(v, (int, tuple)) else str(v) for name, v in constants.items()}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        free = parameter.do_not_specialize
        if value is None or (type(value) is int and value == 1 and not free):
            folded[parameter.name] = value
            types.append((parameter.name, "constexpr"))
        elif isinstance(value, tuple) and isinstance(value[0], int):
            # A 1 would be a constant in a real launch: the maps above have none.
            types.append((parameter.name, tuple("i32" for _ in value)))
            aligned += [(i, j) for j, number in enumerate(value) if number % 16 == 0]
        elif isinstance(value, tuple):
            types.append((parameter.name, tuple(f"*{TYPES[t.dtype]}" for t in value)))
            aligned += [(i, j) for j in range(len(value))]
        elif isinstance(value, Tensor):
            types.append((parameter.name, f"*{TYPES[value.dtype]}"))
            aligned.append((i,))
        else:
            types.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not free:
                aligned.append((i,))
    types += [(name, "constexpr") for name in constants]
    types.sort(key=lambda pair: kernel.arg_names.index(pair[0]))
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(types),
        tuple(aligned),
        tuple(folded.items()),
        tuple(options.items()),
    )


def compile_one(job: Launch, arch: int) -> dict[str, Any]:
    """Compile ``job`` for sm_``arch``; its row of the table."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(__import__(job.module, fromlist=[job.kernel]), job.kernel)
    position = {name: i for i, (name, _) in enumerate(job.types)}
    constants = {(position[name],): tl.dtype(v) if isinstance(v, str) else v for name, v in job.constants}
    source = ASTSource(
        fn=kernel,
        signature=dict(job.types),
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in job.aligned},
    )
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(job.options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(done.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    numbers = {key: int(v) for key, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    arguments = {name: kind for name, kind in job.types if kind != "constexpr"}
    return {
        "kernel": job.kernel,
        "arch": f"sm_{arch}",
        "dtype": _dtype(arguments),
        "constants": {k: v for k, v in job.constants if v is not None},
        **dict(job.options),
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": done.metadata.shared,
    }


def _dtype(arguments: dict[str, Any]) -> str:
    """The dtype of the maps: of the first pointer or list of pointers."""
    kind = next(k for k in arguments.values() if isinstance(k, tuple) or k.startswith("*"))
    return (kind[0] if isinstance(kind, tuple) else kind).removeprefix("*")


def compile_all(jobs: list[Launch], archs: list[int], processes: int = 2) -> Iterator[dict[str, Any]]:
    """The rows of all jobs, compiled side by side."""
    work = [(job, arch) for arch in archs for job in jobs]
    # Not forked: the parent may run threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_one, *zip(*work, strict=True), chunksize=4)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """One line a kernel and architecture: how many variants, and the largest of each number."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    lines = [f"{'kernel':30} {'arch':6} {'variants':>8} {'registers':>11} {'shared':>7} {'spilled':>8}"]
    for (kernel, arch), group in sorted(groups.items()):
        registers = [row["registers"] for row in group]
        shared, spilled = (max(row[key] for row in group) for key in ("shared_bytes", "spilled_bytes"))
        span = f"{min(registers)}-{max(registers)}"
        lines.append(f"{kernel:30} {arch:6} {len(group):8} {span:>11} {shared:7} {spilled:8}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="one supernet shape an op")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    import triton

    jobs = launches(args.kernel, args.dtype, args.quick)
    rows = list(compile_all(jobs, args.arch, args.processes))
    print("\n".join(summary(rows)))
    head = header("python", "bench/triton_aot.py", *sys.argv[1:])
    write(args.out, head | {"triton": triton.__version__, "archs": args.arch}, rows)
    return int(any(row["spilled_bytes"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
