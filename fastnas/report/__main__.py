"""`python -m fastnas.report RUN [RUN ...]`: the report of a run, or of several side by side, as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, run_command
from fastnas.report.comparison import render_comparison
from fastnas.report.records import read_record
from fastnas.report.run_page import render_run


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.report",
        description="Make the report of a run, finished or not, or compare several runs on one page: one HTML file "
        "that loads nothing from anywhere. A folder of python -m fastnas.repeat stands for its runs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--out", type=Path, help="HTML file to write [report.html in the run's folder, or comparison.html]"
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    paths = [path for given in arguments.runs for path in _runs(given)]
    if len(paths) == 1:
        out, text = arguments.out or paths[0] / "report.html", render_run(read_record(paths[0]))
    else:
        out, text = arguments.out or Path("comparison.html"), render_comparison([read_record(path) for path in paths])
    replace_file(out, [text.encode()])
    print(out)
    return 0


def _runs(path: Path) -> list[Path]:
    """The folder itself, or the runs of its seeds."""
    seeds = sorted(path.glob("seed-*/config.toml"), key=lambda config: (len(config.parent.name), config.parent.name))
    return [config.parent for config in seeds] if seeds and not (path / "config.toml").exists() else [path]


if __name__ == "__main__":
    sys.exit(run_command(main))
