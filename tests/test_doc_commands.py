"""Every command and every Python example of the documentation runs, in miniature and in one process."""

from __future__ import annotations

import importlib
import itertools
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnas import config, correlate, retrain, search
from fastnas.profiler import fit, subject
from fastnas.spaces.nasbench201 import Nasbench201Space

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SEPARATORS = {"&", "&&", "|", "||", ";"}

# Commands that do not run here, and why. Their flags are checked all the same.
LEFT_OUT = {
    r"make ": "a target sets up the environment first; CI itself runs test, lint and docs, a night runs the others",
    r"pip ": "it would change the environment; CI installs the wheel into one of its own",
    r"python examples/": "tests/test_own_search.py runs this script",
    r"python (bench/|-m bench\.)": "it measures for minutes; tests/bench runs its parts",
}
# The same for Python: an example that is shown whole.
SHOWN = {ROOT / "examples" / "own_space.py": "tests/test_own_search.py runs this script"}

# What a page takes as done before: commands that run first.
BEFORE = {
    "docs/distributed.md": [
        "python -m fastnas.search --out runs/mine",
        "python -m fastnas.search --method one_shot --out runs/one-shot",
    ],
    "docs/export.md": ["python -m fastnas.retrain --genotype DARTS_V2 --data folder:flowers --out runs/network"],
    "docs/methods/one_shot.md": ["python -m fastnas.search --method one_shot --out RUN"],
    "docs/methods/parsec.md": ["python -m fastnas.search --method parsec --out RUN"],
    "docs/report.md": [
        "python -m fastnas.search --out runs/mine",
        "python -m fastnas.search --method darts --out runs/other",
        "python -m fastnas.repeat --out runs/five",
    ],
    "docs/retraining.md": [
        "python -m fastnas.search --out RUN",
        "python -m fastnas.search --out runs/mine",
    ],
    "docs/troubleshooting.md": [
        "python -m fastnas.search --out runs/mine",
        "python -m fastnas.retrain --genotype runs/mine --out runs/mine-retrained",
    ],
}

# Settings that replace those of presets and commands, where the chosen method has them.
SMALL = {
    **{"epochs": 1, "batch_size": 32, "channels": 4, "cells": 3, "nodes": 2, "threads": 1, "device": "cpu"},
    **{"search_fraction": 0.25, "train_fraction": 0.25, "image_size": 8, "cutout": 2, "warmup_epochs": 0},
    **{"partial": 2, "samples": 1, "population": 2, "generations": 1, "crossovers": 1, "mutations": 1, "candidates": 2},
    **{"ghost_batch": 8, "ranked": 4, "vae_iterations": 2, "vae_hidden": 8},
    **{"buckets": 2, "per_bucket": 1, "top": 1},
}
# What replaces the values of other flags, and of placeholders such as `--channels C`.
SMALLER = {
    "--seeds": "2",
    "--members": "2",
    "--samples": "4",
    **{"--channels": "4", "--cells": "3", "--classes": "5", "--image-size": "32", "--latency": "1,2"},
    # The other one needs a GPU; tests/engine/test_storage.py runs its steps.
    "fastnas.search --storage bfloat16": "float32",
    **{"--genotype NAME": "DARTS_V2", "--data-dir /data/imagenet": "data"},
}


def code_lines(page: Path) -> Iterator[str]:
    """Lines of indented and of shell code, and inline code that starts like a command; no Python code."""
    fence, text = "", page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip() + " "
        elif fence.startswith(("```sh", "```bash", "```console")) or (not fence and line.startswith("    ")):
            yield line.strip()
        elif not fence:
            yield from re.findall(r"`((?:python|make|torchrun) [^`]+)`", line)


def commands(page: Path) -> Iterator[str]:
    """Each command of a page, comments left out."""
    for line in code_lines(page):
        if not re.match(r"(python|make|torchrun|pip) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            if words and words[0] in ("python", "make", "torchrun", "pip"):  # not the rest of RUN|FILE|NAME
                yield shlex.join(words)
            words = []


def is_left_out(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in LEFT_OUT)


def commands_to_run() -> dict[str, list[str]]:
    """By page. What an earlier page has too is left to that one, unless its own page goes on with what it makes."""
    seen: set[str] = set()
    by_page = {}
    for page in PAGES:
        found = [command for command in dict.fromkeys(commands(page)) if not is_left_out(command)]
        by_page[page.relative_to(ROOT).as_posix()] = [
            command for command in found if "--out" in command or command not in seen
        ]
        seen.update(found)
    return by_page


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        block
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if not any(block == path.read_text(encoding="utf-8") for path in SHOWN)
    ]


TO_RUN = commands_to_run()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches and trainings are as small as they can be, whatever presets and commands say."""

    def merge(classes: Sequence[type], *layers: Mapping[str, Any], **more: Any) -> tuple[Any, ...]:
        names = {field.name for cls in classes for field in fields(cls)}
        chosen = {name: value for name, value in SMALL.items() if name in names}
        if any(layer.get("space") == "shufflenet" for layer in layers) and "cells" in chosen:
            chosen["cells"] = 4  # the shortest chain
        return config.merge(classes, *layers, chosen, **more)

    for module in (search, retrain, correlate):
        monkeypatch.setattr(module, "merge", merge)
    monkeypatch.setattr(subject, "largest_batch", lambda peak, limit, **_: fit.largest_batch(peak, limit, maximum=64))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Puts back what `--deterministic` sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, also the home, with the small things that the documentation names."""
    datasets = pytest.importorskip("torchvision", reason="the documentation searches on CIFAR-10").datasets
    pytest.importorskip("PIL", reason="the documentation searches on folders of images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(datasets, "CIFAR10", TinyCifar)
    write_images(tmp_path / "flowers")
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part)
    (tmp_path / "imagenet").symlink_to("data")
    space = Nasbench201Space()
    cells = (space.text(string) for string in itertools.product(*map(range, space.choices)))
    (tmp_path / "nasbench201.csv.gz").write_text("\n".join(["arch,accuracy", *(f"{cell},90" for cell in cells)]))
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\n\n"
        "def resnet():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    return tmp_path


class TinyCifar:
    """Stands in for torchvision's CIFAR10."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert Path(root).name == "data"
        images = 400 if train else 40
        self.data = np.random.default_rng(train).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        self.targets = [index % 10 for index in range(images)]


def write_images(folder: Path, classes: int = 3, images: int = 60) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0)
    for name in map(str, range(classes)):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            picture = Image.fromarray(pixels.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            picture.save(folder / name / f"{index}.png")


def run(command: str) -> None:
    """Run one command in this process, in miniature; of those for torchrun the part that each process does."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        launched = parse_args(words[1:])
        assert launched.module
        module, arguments = launched.training_script, launched.training_script_args
    else:
        assert words[:2] == ["python", "-m"]
        module, *arguments = words[2:]
    package = importlib.import_module(module)
    main = importlib.import_module(f"{module}.__main__") if hasattr(package, "__path__") else package
    for index, (flag, value) in enumerate(zip(arguments, arguments[1:], strict=False), 1):
        smaller = SMALLER.get(f"{flag} {value}", SMALLER.get(flag, value))
        arguments[index] = SMALLER.get(f"{module} {flag} {value}", smaller)
    try:
        code = main.main(arguments)
    except SystemExit as stop:  # of --help, or of an argument that is not known
        code = stop.code
    assert not code, command


@pytest.mark.parametrize("page", [page for page in TO_RUN if TO_RUN[page] or python_blocks(ROOT / page)])
def test_a_page_runs_from_top_to_bottom(page, place, small, deterministic, capsys):
    random.seed(0)
    for command in [*BEFORE.get(page, []), *TO_RUN[page]]:
        run(command)
    names = {"__name__": "documentation"}
    for block in python_blocks(ROOT / page):
        exec(compile(block, page, "exec"), names)


def test_what_does_not_run_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in sorted({command for page in PAGES for command in commands(page) if is_left_out(command)}):
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in targets, command
        elif program == "python":
            script, *words = words if words[0] != "-m" else [words[1].replace(".", "/") + ".py", *words[2:]]
            text = (ROOT / script).read_text(encoding="utf-8")
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in text, command


def test_nothing_is_excused_in_vain():
    every = [command for page in PAGES for command in commands(page)]
    assert [pattern for pattern in LEFT_OUT if not any(re.match(pattern, command) for command in every)] == []
    assert set(BEFORE) <= {page for page, found in TO_RUN.items() if found}
    assert sum(map(len, TO_RUN.values())) > 60
