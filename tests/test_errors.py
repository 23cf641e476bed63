"""Wrong input to the commands: one clear line that says what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas import info, retrain, search
from fastnas.cli import run_command
from fastnas.config import dump_toml, read_toml
from fastnas.spaces import load_genotype

COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    name: command.main for name, command in (("search", search), ("retrain", retrain), ("info", info))
}
SIZE = {"epochs": 1, "batch-size": 8, "channels": 4, "cells": 3, "cutout": 0}
TINY = [*(f"--{name}={value}" for name, value in SIZE.items()), "--threads=1", "--device=cpu", "--quiet"]
NODES = ["--nodes", "2"]


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    """A run that starts although it should not leaves its folder here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture(scope="module")
def images(archive: Callable[..., Path]) -> Path:
    return archive(40, 4)


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of two methods and of a retraining; tests work on copies."""
    folder = tmp_path_factory.mktemp("runs")
    shared = [*TINY, "--data", f"npz:{images}"]
    for arguments in (
        ["search", "--method", "darts", *shared, *NODES, "--epochs", "2", "--out", str(folder / "darts")],
        ["search", "--method", "pc_darts", "--partial", "2", *shared, *NODES, "--out", str(folder / "pc_darts")],
        ["retrain", "--genotype", "DARTS_V2", *shared, "--out", str(folder / "retrain")],
    ):
        with pytest.raises(SystemExit) as caught:
            run_command(COMMANDS[arguments[0]], arguments[1:])
        assert caught.value.code == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the DARTS run."""
    return shutil.copytree(runs["darts"], tmp_path / "run")


@pytest.fixture
def error(capsys) -> Callable[..., str]:
    """The one line that a command prints when it refuses its arguments."""

    def refuse(command: str, *arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command(COMMANDS[command], arguments)
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.count("\n") == 1 and "Traceback" not in output.err
        assert caught.value.code == 2
        return output.err.removeprefix("error: ").removesuffix("\n")

    return refuse


def check(line: str, *parts: str) -> None:
    """The parts stand in the line, in this order."""
    position = 0
    for part in parts:
        assert part in line[position:], (part, line)
        position = line.index(part, position) + len(part)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--data cifar10 --data-dir /absent", ("cifar10 was not found in /absent", "point --data-dir at the folder")),
        ("--data imagenet --data-dir /absent", ("imagenet was not found in /absent", "point --data-dir at the")),
        ("--data folder:/absent", ("no folder /absent", "check the path")),
        ("--data npz:/absent", ("no file /absent", "check the path after npz:")),
        ("--data dgits", ("unknown data set 'dgits'", "did you mean 'digits'?", "known: digits, cifar10")),
        ("--data folder:", ("folder: needs a path after the colon",)),
        ("--preset pcdarts", ("unknown preset 'pcdarts'", "did you mean 'pc_darts'?", "give the path of a .toml")),
        ("--preset absent.toml", ("cannot read the settings file absent.toml", "No such file")),
        ("--preset retrain", ("the preset retrain is for python -m fastnas.retrain",)),
        ("--preset parsec --method darts", ("parsec is for method parsec, not darts", "drop --preset or --method")),
        ("--method dart", ("method must be one of darts, pc_darts", "got 'dart'", "did you mean 'darts'?")),
        ("--space nasbench", ("space must be one of darts, nasnet, ", "got 'nasbench'; did you mean 'nasbench201'?")),
        ("--bach-size 3", ("unknown argument --bach-size", "did you mean '--batch-size'", "fastnas.search --help")),
        ("--batch-size", ("--batch-size: expected one argument",)),
        ("--batch-size 0", ("batch-size must be at least", "got 0")),
        ("--batch-size -8", ("batch-size must be at least", "got -8")),
        ("--batch-size 900", ("batch size 900 is larger than the training part of digits", "that works is 719")),
        ("--batch-size many", ("batch-size must be an integer, got 'many'",)),
        ("--epochs 1.5", ("epochs must be an integer, got '1.5'",)),
        ("--lr fast", ("lr must be a number, got 'fast'",)),
        ("--lr nan", ("lr must be a number, got nan",)),
        ("--lr 0", ("lr must be above 0",)),
        ("--arch-betas 0.5,x", ("arch-betas must be a number, got 'x'",)),
        ("--cells 2", ("cells must be at least 3, got 2",)),
        ("--num-classes 9", ("labels of digits go up to 9", "--num-classes is 9", "give at least 10")),
        ("--search-fraction 0.0001", ("the search part of digits is empty", "change --search-fraction")),
        ("--search-fraction 1", ("search-fraction must be at most 0.9",)),
        ("--method pc_darts --partial 4 --channels 12", ("channels must be a multiple of 2k = 8", "got 12")),
        ("--method darts --samples 4", ("samples is a setting of parsec and random, not of the chosen method",)),
        ("--method random --order 2", ("order is a setting of darts and pc_darts",)),
        ("--method random --samples 9 --epochs 3", ("9 samples need at least 9 epochs, got 3",)),
        ("--device gpu", ("device must be auto, cpu, cuda or cuda:N, got 'gpu'",)),
        ("--seed 18446744073709551616", ("seed must be at most",)),
        ("--resume absent", ("absent is no folder", "give the folder of a run")),
        ("--resume .", ("has no config.toml, so it is no run folder", "give the folder of a run")),
    ],
)
def test_search(arguments, parts, error, tmp_path):
    if "cifar10" in arguments:
        pytest.importorskip("torchvision")
    check(error("search", *arguments.split()), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["search", "retrain --genotype DARTS_V2"])
def test_no_gpu(command, error):
    check(error(*command.split(), "--device", "cuda"), "device 'cuda' cannot be used here (", "try --device cpu")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ("which genotype? give --genotype with a run folder, a file, or a published name",)),
        (
            "--genotype DART_V2",
            ("genotype 'DART_V2'", "no such file", "no published genotype has that name", "DARTS_V2"),
        ),
        ("--genotype DARTS_V2 --data folder:/absent", ("no folder /absent",)),
        ("--genotype DARTS_V2 --batch-size 0", ("batch-size must be at least 2, got 0",)),
        ("--genotype DARTS_V2 --batch-size 1", ("batch-size must be at least 2, got 1",)),
        ("--genotype DARTS_V2 --batch-size 2000", ("2000 is larger than the training set of digits (1438 images)",)),
        ("--genotype DARTS_V2 --num-classes 3", ("labels of digits go up to 9 but --num-classes is 3",)),
        ("--genotype DARTS_V2 --channels 5", ("channels must be an even number", "got 5")),
        ("--genotype DARTS_V2 --preset retrian", ("unknown preset 'retrian'", "did you mean 'retrain'?")),
        ("--genotype DARTS_V2 --preset darts", ("the preset darts is for python -m fastnas.search",)),
        ("--genotype DARTS_V2 --drop-path 1", ("drop-path must be at most 0.99",)),
        ("--genotyp DARTS_V2", ("unknown argument --genotyp", "did you mean '--genotype'")),
        ("--resume absent", ("absent is no folder",)),
    ],
)
def test_retrain(arguments, parts, error, tmp_path):
    check(error("retrain", *arguments.split()), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--genotype absent.json", ("'absent.json'", "no such file")),
        ("--genotype DARTS_V2 --channels 7", ("channels must be an even number", "got 7")),
        ("--genotype DARTS_V2 --channels x", ("--channels: invalid int value: 'x'",)),
        ("--genotype DARTS_V2 --image-size 0", ("image-size must be at least 1, got 0",)),
        ("--genotype DARTS_V2 --classes -1", ("classes must be at least 1, got -1",)),
        ("--genotype DARTS_V2 --stem cifr", ("--stem: invalid choice: 'cifr'", "cifar", "imagenet")),
        ("--genotpe DARTS_V2", ("unknown argument --genotpe", "did you mean '--genotype'")),
    ],
)
def test_info(arguments, parts, error):
    check(error("info", *arguments.split()), *parts)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot parse the tuple notation"),
        (b'{"format": "fastnas-genotype", ', "not valid JSON"),
        (b'{"normal": []}', 'lacks "format": "fastnas-genotype"'),
        (b"Genotype(normal=__import__('os').getcwd())", "only names, numbers and lists may appear"),
        (b"\xff\xfe", "cannot be read"),
        ("unknown candidate", "unknown candidate 'conv_9x9'"),
        ("unknown state", "reads state 7; it can read states 0 to 1"),
        ("cut off", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("command", ["retrain", "info"])
def test_broken_genotype_files(command, content, reason, error, tmp_path):
    path = tmp_path / "genotype.json"
    text = load_genotype("DARTS_V2").to_json()
    if content == "unknown candidate":
        content = text.replace("sep_conv_3x3", "conv_9x9").encode()
    elif content == "unknown state":
        table = json.loads(text)
        table["normal"][0][0][1] = 7
        content = json.dumps(table).encode()
    elif content == "cut off":
        content = text[: len(text) // 2].encode()
    path.write_bytes(content)
    check(error(command, "--genotype", str(path)), "genotype.json", reason)
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_folder_is_not_overwritten(run, error):
    check(error("search", "--out", str(run)), f"{run} holds a run", f"--resume {run}", "give another --out")
    check(error("retrain", "--genotype", "DARTS_V2", "--out", str(run)), f"{run} holds a run")
    run.joinpath("config.toml").unlink()
    check(error("search", "--out", str(run)), f"the folder {run} is not empty", "give another --out")


def test_a_preset_file_with_an_unknown_setting(tmp_path, error):
    (tmp_path / "mine.toml").write_text("bach_size = 3\n")
    line = error("search", "--preset", "mine.toml")
    check(line, "mine.toml: unknown setting 'bach_size'", "did you mean 'batch_size'?")
    (tmp_path / "mine.toml").write_text("batch_size = ten\n")
    check(error("search", "--preset", "mine.toml"), "mine.toml is not valid TOML")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--epochs 4", ("--epochs cannot change", "drop it, or start a new run with --out")),
        ("--samples 4", ("--samples cannot change",)),
        ("--method parsec", ("searched with method darts, not parsec", "drop --method")),
        ("--out other", ("drop --preset and --out",)),
        ("--preset darts", ("drop --preset and --out",)),
    ],
)
def test_a_search_goes_on_as_it_was_set_up(arguments, parts, run, error):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    check(error("search", "--resume", str(run), *arguments.split()), *parts)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_each_command_goes_on_with_its_own_runs(runs, error):
    darts, retrained = runs["darts"], runs["retrain"]
    check(error("retrain", "--resume", str(darts)), f"{darts} is a search", f"fastnas.search --resume {darts}")
    check(error("search", "--resume", str(retrained)), "is no search", f"fastnas.retrain --resume {retrained}")
    check(error("retrain", "--resume", str(retrained), "--epochs", "4"), "drop the flags that would change it")


@pytest.mark.parametrize("command", ["search", "retrain"])
def test_a_checkpoint_of_another_method(command, runs, tmp_path, error):
    run = shutil.copytree(runs["pc_darts" if command == "search" else "retrain"], tmp_path / "copy")
    shutil.copy(runs["darts"] / "checkpoint.pt", run / "checkpoint.pt")
    method = "pc_darts" if command == "search" else "retrain"
    line = error(command, "--resume", str(run))
    check(line, f"{run / 'checkpoint.pt'} was written by method darts, not {method}", "start a new run")


def test_a_checkpoint_of_other_settings(run, error):
    config = read_toml(run / "config.toml")
    (run / "config.toml").write_text(dump_toml(config | {"channels": 8}))
    check(error("search", "--resume", str(run)), "checkpoint", "does not fit the settings in", "config.toml")


def test_both_checkpoints_damaged(run, error):
    (run / "checkpoint.pt").write_bytes(b"")
    content = (run / "checkpoint.prev.pt").read_bytes()
    (run / "checkpoint.prev.pt").write_bytes(content[:-1])
    line = error("search", "--resume", str(run))
    check(line, f"no good checkpoint in {run}", "checkpoint.pt is not a fastnas checkpoint", "is damaged", "new run")


def test_no_checkpoint(run, error):
    for path in run.glob("checkpoint*.pt"):
        path.unlink()
    check(error("search", "--resume", str(run)), f"no checkpoint at {run / 'checkpoint.pt'}", "start a new run")


def test_retraining_on_other_data_than_the_search_is_pointed_out(runs, images):
    message = f"searched on npz:{images}, and this trains on digits: for the same give --data npz:{images}"
    with pytest.warns(UserWarning, match=re.escape(message)):
        retrain.main(["--genotype", str(runs["darts"]), *TINY, "--batch-size=256"])


def test_labels_that_are_none_of_the_classes(tmp_path, error):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 5 - 1)
    check(error("search", "--data", "npz:a.npz"), "a.npz has the label -1", "labels must run from 0")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(COMMANDS[command], ["--help"])
    output = capsys.readouterr()
    assert (caught.value.code, output.err) == (0, "")
    assert output.out.startswith(f"usage: python -m fastnas.{command} ")
    assert "None" not in output.out and "SUPPRESS" not in output.out and "%(" not in output.out
