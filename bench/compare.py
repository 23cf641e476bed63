"""Sets two runs of the benchmarks side by side: two files of results, or two commits that are measured for it.

    python bench/compare.py old.json new.json
    python bench/compare.py main --op mixed_sum            # the commit main against the working tree
    python bench/compare.py v0.1 main -k darts --repeats 5

Commits are checked out into worktrees and built there, the working tree is built in place. The tests of the ops come
first: nothing is timed while they fail. Both sides are then measured in turn with the benchmarks of the working tree.
A row is marked when it changed by more than 5% and more than 2 microseconds, with a question mark when the two
sides' ranges (20th to 80th percentile, over all repeats) overlap.
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
class Times:
    """Microseconds of one row of one side: the median of its runs, the least 20th and the largest 80th percentile."""

    us: float
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Times:
        median = statistics.median(row["us"] for row in rows)
        return cls(median, min(row["us_20"] for row in rows), max(row["us_80"] for row in rows))


@dataclass(frozen=True)
class Change:
    """One row before and after; None where the row is missing."""

    name: str
    before: Times | None
    after: Times | None

    @property
    def ratio(self) -> float | None:
        """``after / before``: below 1 is faster."""
        return None if self.before is None or self.after is None else self.after.us / self.before.us

    @property
    def mark(self) -> str:
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        difference = self.after.us - self.before.us
        if abs(difference) <= ABSOLUTE_US or abs(difference) <= RELATIVE * self.before.us:
            return ""
        overlap = self.before.low <= self.after.high and self.after.low <= self.before.high
        return ("slower" if difference > 0 else "faster") + ("?" if overlap else "")


def compare(before: dict[str, Times], after: dict[str, Times]) -> list[Change]:
    """All rows of both, in the order of ``after``, those that are gone last."""
    names = [*after, *(name for name in before if name not in after)]
    return [Change(name, before.get(name), after.get(name)) for name in names]


def lines(changes: Sequence[Change]) -> list[str]:
    width = max((len(change.name) for change in changes), default=0)
    table = [f"{'us a call':{width}} {'before':>10} {'after':>10} {'ratio':>7}"]
    for change in changes:
        before, after = (f"{t.us:10.1f}" if t is not None else f"{'-':>10}" for t in (change.before, change.after))
        ratio = f"{change.ratio:7.3f}" if change.ratio is not None else f"{'-':>7}"
        table.append(f"{change.name:{width}} {before} {after} {ratio}  {change.mark}".rstrip())
    return table


def machines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    if before["machine"] == after["machine"]:
        return [before["machine"]]
    return [before["machine"], after["machine"], "these are different machines: the ratios say nothing about the code"]


def times(reports: Sequence[dict[str, Any]]) -> dict[str, Times]:
    """The rows of repeated runs of one side, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for row in report["rows"]:
            found.setdefault(row["name"], []).append(row)
    return {name: Times.of(rows) for name, rows in found.items()}


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


def python(tree: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``tree``, with its fastnas before the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True, text=True)


def measure(trees: Sequence[Path], ops: Sequence[str], select: str, repeats: int) -> list[list[dict[str, Any]]]:
    """Build and test every tree, then measure them in turn; the reports of each.

    Raises:
        SystemExit: a build fails, or a test of an op that the tree has.
    """
    for tree in trees:
        print(f"build and test {tree}", flush=True)
        tests = [test for op in ops if (test := tree / "tests" / "ops" / f"test_{op}.py").exists()]
        steps = [["setup.py", "-q", "build_ext", "--inplace"], ["-m", "pytest", "-q", "-x", *tests]]
        for step in steps if tests else steps[:1]:
            done = python(tree, *step)
            if done.returncode:
                raise SystemExit(f"{done.stdout}{done.stderr}\ncompare: this failed in {tree}, so nothing is timed")

    files = [f"bench/test_{op}.py" for op in (*ops, "overhead")]
    rows = f"({' or '.join(ops)})" + (f" and ({select})" if select else "")
    flags = ["--benchmark-only", "--no-compile", "--continue-on-collection-errors", "-k", rows]
    reports: list[list[dict[str, Any]]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for tree, found in zip(trees, reports, strict=True):
                print(f"measure {tree} ({repeat + 1} of {repeats})", flush=True)
                out = Path(folder) / "results.json"
                done = python(tree, "-m", "pytest", "-q", "--tb=line", *files, *flags, "--results", out)
                # An op that one side does not have fails there: its rows are missing, the others count.
                for line in done.stdout.splitlines():
                    if line.startswith(("FAILED", "ERROR")):
                        print(f"  {line}")
                if not out.exists():
                    raise SystemExit(f"{done.stdout}{done.stderr}\ncompare: no row was measured in {tree}")
                found.append(json.loads(out.read_text()))
                out.unlink()
    return reports


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
        before, after = ([json.loads(file.read_text())] for file in files)
    elif files:
        parser.error("two files of results or two commits are compared, not one of each")
    else:
        ops = args.op or sorted(benches)
        with checkout(args.before) as old, checkout(args.after) as new:
            before, after = measure([old, new], ops, args.select, args.repeats)
    table = lines(compare(times(before), times(after)))
    print("\n".join([*machines(before[0], after[0]), *table]))


if __name__ == "__main__":
    main()
