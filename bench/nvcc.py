"""Compile every CUDA source for two GPU generations, without a GPU, with warnings as errors.

Prints one row a kernel with registers, spilled bytes and shared memory as ptxas reports them, and fails if one spills.
``--out`` writes the rows to a file, ``bench/results/nvcc.json`` in the repository.

    python bench/nvcc.py [--arch sm_80 sm_90a] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# Those of setup.py, and what makes every warning an error and ptxas talk.
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-fopenmp-simd,-fvisibility=hidden"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Werror=all-warnings", "-Xptxas=-v"]
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def rows_of(report: str, source: str) -> list[dict[str, Any]]:
    """One row a kernel from what ``ptxas -v`` wrote."""
    rows = []
    for found in REPORT.finditer(report):
        signature = subprocess.run(["c++filt", found["name"]], capture_output=True, text=True, check=True).stdout
        kernel, constants = re.search(r"(\w+_kernel)<(.*?)>\(", signature).groups()
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        rows.append(
            {
                "source": source,
                "kernel": kernel,
                "constants": constants.replace("fastnas::", ""),
                "arch": found["arch"],
                "registers": int(found["registers"]),
                "spilled_bytes": int(found["stores"]) + int(found["loads"]),
                "stack_bytes": int(found["stack"]),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], row["constants"]))


def compiled(source: Path, arch: str) -> list[dict[str, Any]]:
    """Compile one file for ``arch``; its rows.

    Raises:
        SystemExit: nvcc refuses the file or warns about it.
    """
    include = Path(torch.__file__).parent / "include"
    places = ["-I", str(ROOT / "csrc"), "-isystem", str(include)]
    command = ["nvcc", *FLAGS, f"-arch={arch}", *places, "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"nvcc refuses {source.relative_to(ROOT)} for {arch}:\n{done.stderr}")
    return rows_of(done.stderr, str(source.relative_to(ROOT)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90a"])
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = [
        row
        for arch in options.arch
        for source in sorted((ROOT / "csrc").rglob("*.cu"))
        for row in compiled(source, arch)
    ]
    for row in rows:
        print(
            f"{row['arch']:7} {row['kernel']:28} {row['constants']:14} {row['registers']:4} registers "
            f"{row['shared_bytes']:6} B shared {row['spilled_bytes']:4} B spilled"
        )
    if options.out:
        sys.path.insert(0, str(ROOT))
        from bench.report import header, write

        release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        head = header("python", "bench/nvcc.py", "--out", str(options.out))
        write(options.out, head | {"nvcc": re.search(r"V([\d.]+)", release)[1], "flags": FLAGS}, rows)
    if spilled := [f"{row['kernel']}<{row['constants']}>" for row in rows if row["spilled_bytes"]]:
        raise SystemExit(f"these kernels spill registers: {', '.join(spilled)}")


if __name__ == "__main__":
    main()
