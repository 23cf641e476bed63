"""Command lines: each error is one line with the right exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from fastnas.cli import ArgumentParser, Terminated, run_command
from fastnas.errors import UserError

NEAREST = "error: unknown argument {}; did you mean '--batch-size'; see search --help"


@pytest.fixture(autouse=True)
def restore_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def run(capsys, main, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run_command(main, arguments)
    return caught.value.code, capsys.readouterr().err


def fail_with(error: BaseException):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_of_main(capsys, result, code):
    assert run(capsys, lambda arguments: result) == (code, "")


def test_arguments_reach_main(capsys):
    seen = []
    run(capsys, seen.append, "--a", "b")
    assert seen == [["--a", "b"]]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no folder x:\n  give another"), 2, "error: no folder x: give another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("lr"), 1, "error: KeyError: 'lr'; run again with --debug for the traceback"),
        (ValueError(""), 1, "error: ValueError; run again with --debug for the traceback"),
        (OSError(5, "Input/output error", "a.pt"), 1, "error: OSError: [Errno 5] Input/output error: 'a.pt'; run"),
        (
            OSError(28, "No space left", "a.pt"),
            1,
            "error: the disk is full, a.pt could not be written: free some space",
        ),
        (Terminated(), 143, "terminated"),
        (torch.OutOfMemoryError("CUDA ..."), 1, "error: out of memory: give a smaller --batch-size"),
        (MemoryError(), 1, "error: out of memory: give a smaller --batch-size"),
    ],
)
def test_errors_are_one_line(capsys, error, code, line):
    got, text = run(capsys, fail_with(error))
    assert got == code
    assert text.startswith(line) and text.count("\n") == 1 and text.endswith("\n")


def test_memory_error_of_the_cpu_allocator(capsys):
    code, text = run(capsys, lambda arguments: torch.empty(2**50))
    assert code == 1 and text.startswith("error: out of memory")


def test_debug_shows_the_traceback(capsys):
    code, text = run(capsys, fail_with(UserError("wrong")), "--debug")
    assert code == 2
    assert "Traceback" in text and text.endswith("\nerror: wrong\n")
    code, text = run(capsys, fail_with(KeyError("lr")), "--debug")
    assert code == 1
    assert "Traceback" in text and text.endswith("\nerror: KeyError: 'lr'\n")


def test_warnings_are_one_line(capsys):
    def main(arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("the checkpoint\nis old", stacklevel=1)

    assert run(capsys, main) == (0, "warning: the checkpoint is old\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch-siz", "3"], NEAREST.format("--batch-siz")),
        (["--batch", "3"], NEAREST.format("--batch")),
        (["--qqqq=1"], "error: unknown argument --qqqq; see search --help"),
        (["--batch-size"], "error: argument --batch-size: expected one argument; see search --help"),
        (["--batch-size", "x"], "error: argument --batch-size: invalid int value: 'x'; see search --help"),
    ],
)
def test_parser_errors_are_one_line(capsys, arguments, line):
    def main(arguments):
        parser = ArgumentParser(prog="search")
        parser.add_argument("--batch-size", type=int)
        parser.parse_args(arguments)

    assert run(capsys, main, *arguments) == (2, line + "\n")


def test_help_fits_and_keeps_the_description(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = ArgumentParser(prog="search", description="Search. " * 20 + "\n\n  example: search --method darts")
    parser.add_argument("--arch-weight-decay", metavar="FLOAT", help="weight decay of the alphas " * 5)
    text = parser.format_help()
    assert "\n  example: search --method darts\n" in text
    assert re.search("  --arch-weight-decay FLOAT +weight decay of the alphas", text)
    assert "--debug" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_closed_pipe_is_quiet():
    script = "from fastnas.cli import run_command\nrun_command(lambda a: print('line\\n' * 100000))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert error == b""


@pytest.mark.parametrize("module", ["fastnas.search", "fastnas.report"])
def test_ctrl_c_while_torch_is_loaded_is_one_line(module, tmp_path):
    (tmp_path / "torch.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    process = subprocess.Popen(
        [sys.executable, "-m", module, "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"interrupted\n")
    assert process.returncode == 130


def test_importing_fastnas_leaves_ctrl_c_alone(tmp_path):
    """Also from the package of a command of one's own, while Python looks for that."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import fastnas\n")
    script = "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    (tmp_path / "mine" / "train.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    for arguments in (["-m", "mine.train", "fastnas.search"], ["-c", f"import fastnas\n{script}", "-m"]):
        assert subprocess.check_output([sys.executable, *arguments], env=environment) == b"True\n"


def test_importing_it_is_light():
    script = "import sys, fastnas.cli, fastnas.config; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script]) == b"False\n"
