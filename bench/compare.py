"""Sets two runs of the benchmarks side by side: two files of results, or two commits that are measured for it.

    python bench/compare.py old.json new.json
    python bench/compare.py main --op mixed_sum            # the commit main against the working tree
    python bench/compare.py v0.1 main -k darts --repeats 5

Commits are checked out into worktrees and built there, the working tree is built in place. The tests of the ops come
first: nothing is timed while they fail. Both sides are then measured in turn with the benchmarks of the working tree.
A row is marked when it changed by more than 5% and more than 2 microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELATIVE, ABSOLUTE_US = 0.05, 2.0


@dataclass(frozen=True)
class Change:
    """Microseconds of one row before and after; None where the row is missing."""

    name: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """``after / before``: below 1 is faster."""
        return None if self.before is None or self.after is None else self.after / self.before

    @property
    def mark(self) -> str:
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        difference = self.after - self.before
        if abs(difference) <= ABSOLUTE_US or abs(difference) <= RELATIVE * self.before:
            return ""
        return "slower" if difference > 0 else "faster"


def compare(before: dict[str, float], after: dict[str, float]) -> list[Change]:
    """All rows of both, in the order of ``after``, those that are gone last."""
    names = [*after, *(name for name in before if name not in after)]
    return [Change(name, before.get(name), after.get(name)) for name in names]


def lines(changes: Sequence[Change]) -> list[str]:
    width = max((len(change.name) for change in changes), default=0)
    table = [f"{'us a call':{width}} {'before':>10} {'after':>10} {'ratio':>7}"]
    for change in changes:
        before, after = (f"{us:10.1f}" if us is not None else f"{'-':>10}" for us in (change.before, change.after))
        ratio = f"{change.ratio:7.3f}" if change.ratio is not None else f"{'-':>7}"
        table.append(f"{change.name:{width}} {before} {after} {ratio}  {change.mark}".rstrip())
    return table


def rows_of(report: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["us"] for row in report["rows"]}


def median_rows(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each row's median over repeated runs of one commit."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for name, us in rows_of(report).items():
            found.setdefault(name, []).append(us)
    return {name: statistics.median(values) for name, values in found.items()}


@contextlib.contextmanager
def checkout(commit: str | None) -> Iterator[Path]:
    """The tree of ``commit`` with the benchmarks of the working tree; the working tree itself for None."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
            # An editable install maps fastnas.kernels to the working tree; a folder inside the package goes first.
            (tree / "fastnas" / "kernels").symlink_to(tree / "kernels")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def python(tree: Path, *arguments: str | Path) -> int:
    """Runs Python in ``tree``, with its fastnas before the installed one; the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, check=False).returncode


def measure(trees: Sequence[Path], ops: Sequence[str], select: str, repeats: int) -> list[dict[str, float]]:
    """Build and test every tree, then measure them in turn; the rows of each.

    Raises:
        SystemExit: a build fails, or a test of an op that the tree has.
    """
    for tree in trees:
        print(f"build and test: {tree}", flush=True)
        if python(tree, "setup.py", "-q", "build_ext", "--inplace"):
            raise SystemExit(f"compare: the build in {tree} failed")
        tests = [test for op in ops if (test := tree / "tests" / "ops" / f"test_{op}.py").exists()]
        if tests and python(tree, "-m", "pytest", "-q", "-x", *tests):
            raise SystemExit(f"compare: tests in {tree} fail, so nothing is timed")

    reports: list[list[dict[str, Any]]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for tree, found in zip(trees, reports, strict=True):
                print(f"measure {repeat + 1}/{repeats}: {tree}", flush=True)
                out = Path(folder) / "results.json"
                files = [f"bench/test_{op}.py" for op in (*ops, "overhead")]
                flags = ["--benchmark-only", "--no-compile", "--continue-on-collection-errors", "--results", out]
                # The exit status is not asked for: an op that one side does not have fails there.
                python(tree, "-m", "pytest", "-q", "--tb=line", *files, *flags, "-k", select)
                if not out.exists():
                    raise SystemExit(f"compare: no row was measured in {tree}")
                found.append(json.loads(out.read_text()))
                out.unlink()
    return [median_rows(found) for found in reports]


def main(arguments: Sequence[str] | None = None) -> None:
    benches = {path.stem.removeprefix("test_") for path in (ROOT / "bench").glob("test_*.py")} - {"overhead"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a file of results or a commit")
    parser.add_argument("after", nargs="?", help="a file of results or a commit [the working tree]")
    parser.add_argument("--op", action="append", choices=sorted(benches), help="measure this op only; may be repeated")
    parser.add_argument("-k", dest="select", default="", help="measure the rows that pytest's -k selects")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turn [%(default)s]")
    args = parser.parse_args(arguments)

    files = [Path(name) for name in (args.before, args.after) if name and name.endswith(".json")]
    if len(files) == 2:
        before, after = (rows_of(json.loads(file.read_text())) for file in files)
    elif files:
        parser.error("two files of results or two commits are compared, not one of each")
    else:
        ops = args.op or sorted(benches)
        with checkout(args.before) as old, checkout(args.after) as new:
            before, after = measure([old, new], ops, args.select, args.repeats)
    print("\n".join(lines(compare(before, after))))


if __name__ == "__main__":
    main()
