"""Quick tests on pairs of Python and torch, each in an environment of its own that is deleted afterwards.

    python3 tests/matrix.py --out bench/results/matrix.json 3.10:2.11.0 3.13:2.11.0

The first pair builds one wheel from the files that git knows, and all pairs install that wheel: it is built on the
stable ABI. Each pair imports it, tests the ops, the supernet and the parsers, and searches for one epoch. Pythons are
found under ~/.pyenv or as python3.X on the PATH. Rows of other pairs stay in the file. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    *("3.10:2.11.0", "3.11:2.11.0", "3.12:2.11.0", "3.13:2.11.0"),
    *("3.11:2.13.0", "3.11:2.14.1", "3.13:2.14.1", "3.13:2.15.0"),
]
BUILD_TOOLS = ["setuptools>=77", "ninja"]
PACKAGES = ["numpy", "rich", "matplotlib", "scikit-learn", "tomli", "pytest", "hypothesis", "pillow"]
TESTS = [
    *("tests/test_import.py", "tests/test_backends.py", "tests/spaces/test_genotype.py", "tests/data/test_npz.py"),
    *("tests/ops/test_mixed_sum.py", "tests/ops/test_path_dropout.py", "tests/engine/test_checkpoint.py"),
    "tests/engine/test_supernet.py",
]
FACTS = """
import json, sys, torch
from fastnas import _backends, _ext
problem = _ext.load("cpu")
native = {row.op for row in _backends.table() if (row.device, row.backend) == ("cpu", "native")}
try:
    import torchvision
    vision = torchvision.__version__
except (ImportError, RuntimeError):
    vision = None
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": vision,
                  "native_ops": len(native), "library": problem or "loaded"}))
"""


class Failed(Exception):
    """A step of a pair did not succeed; the text is the end of its output."""


def run(command: list[str], folder: Path, log: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        raise Failed(done.stdout[-600:])
    return done.stdout


def interpreter(version: str) -> str | None:
    """The newest Python of a minor version."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


def try_pair(pair: str, work: Path, log: Path) -> dict[str, object]:
    version, _, torch = pair.partition(":")
    python = interpreter(version)
    if python is None:
        return {"result": f"not run: there is no python{version} here"}
    started = time.monotonic()
    venv, tests = work / "venv", work / "tests"
    try:
        run([python, "-m", "venv", str(venv)], work, log)
        binary = str(venv / "bin" / "python")
        pip = [binary, "-m", "pip", "install", "-q", "--cache-dir", str(work / "cache")]
        run([*pip, *BUILD_TOOLS, f"torch=={torch}"], work, log)
        run([*pip, *PACKAGES], work, log)
        if not (wheels := list(work.glob("*.whl"))):
            build = ["wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(work), str(work / "source")]
            run([binary, "-m", "pip", *build], work, log)
            wheels = list(work.glob("*.whl"))
        run([*pip, "--no-deps", str(wheels[0])], work, log)
        row = {"wheel": wheels[0].name, **json.loads(run([binary, "-c", FACTS], tests, log).splitlines()[-1])}
        output = run([binary, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile", *TESTS], tests, log)
        row["tests"] = output.strip().splitlines()[-1]
        small = "--epochs 1 --channels 8 --cells 3 --threads 1 --quiet --out run"
        run([binary, "-m", "fastnas.search", *small.split()], work, log)
        accuracy = json.loads((work / "run" / "metrics.jsonl").read_text())["search_accuracy"]
        return {**row, "search_accuracy": round(accuracy, 4), "result": "works", "seconds": seconds(started)}
    except Failed as failure:
        return {"result": "fails", "output": str(failure), "seconds": seconds(started)}
    finally:
        shutil.rmtree(venv, ignore_errors=True)
        shutil.rmtree(work / "run", ignore_errors=True)


def seconds(started: float) -> int:
    return round(time.monotonic() - started)


def copy_sources(work: Path) -> None:
    """What git knows: all of it to build from, and the tests alone, beside which no package lies."""
    names = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, names.decode().split("\0")):
        for folder in ("source", "tests") if name.startswith("tests/") or name == "pyproject.toml" else ("source",):
            (work / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, work / folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="PYTHON:TORCH, for example 3.12:2.11.0")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--wheel", type=Path, help="a wheel that is built already [build one]")
    parser.add_argument("--free", type=float, default=25, help="GiB of disk to leave free [25]")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--match=", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="fastnas-matrix-") as folder:
        work = Path(folder)
        copy_sources(work)
        if arguments.wheel:
            shutil.copy2(arguments.wheel, work)
        for pair in arguments.pairs:
            free = shutil.disk_usage(work).free / 2**30
            if free < arguments.free + 8:  # a CUDA build of torch takes 5 GiB, and as much while it is unpacked
                rows[pair] = {"result": f"not run: {free:.0f} GiB of disk are free"}
            else:
                rows[pair] = {"date": time.strftime("%Y-%m-%d"), "commit": commit}
                rows[pair] |= try_pair(pair, work, work / "log.txt")
            print(pair, rows[pair], flush=True)
            if arguments.out:
                command = f"python3 tests/matrix.py --out FILE {' '.join(PAIRS)}"
                head = {"machine": f"{platform.machine()}, one thread", "command": command}
                arguments.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return int(any(row["result"] == "fails" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
