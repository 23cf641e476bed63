"""`python -m fastnas.profile`: what a search step needs in memory, before it is run.

As library calls: `method_steps({"channels": 16}, methods=["darts"])[0].predict()`, and for any module
`module_step(module, image=(3, 32, 32), batch_size=64).predict()`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.config import add_flags, given
from fastnas.engine.supernet import EXECUTORS
from fastnas.errors import UserError, did_you_mean
from fastnas.info import IMAGENET_SIZE
from fastnas.methods import METHODS, WeightSettings
from fastnas.profiler.footprint import Footprint
from fastnas.profiler.sizes import format_size, parse_size
from fastnas.profiler.step import Inputs, ModuleTraining
from fastnas.profiler.subject import Subject
from fastnas.report.footprints import draw_bars, draw_timelines
from fastnas.runs import versions
from fastnas.search import resolve, search_step
from fastnas.spaces import SPACES

DEFAULT_METHODS = ("darts", "pc_darts", "parsec")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One subject of the table: its prediction, its measurement if there is one, and the batch that fits."""

    predicted: Footprint
    measured: Footprint | None = None
    fits: int | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured peak, less 1."""
        return None if self.measured is None else self.predicted.peak / self.measured.peak - 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted.as_dict(),
            "measured": None if self.measured is None else self.measured.as_dict(),
            "error": self.error,
            "fits": self.fits,
        }


def method_steps(
    flags: Mapping[str, Any],
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    executors: Sequence[str] = (),
    image: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    steps: int = 1,
) -> list[Subject]:
    """The search steps of methods, each with its paper's preset and then `flags` (as of `python -m fastnas.search`).

    A setting that only some of the methods have goes to these. `executors`: run each method on each of them, to be
    compared, as steps named "darts, lean"; `image`: [C, H, W]; from 128 pixels on the stem is that of ImageNet unless
    `flags` say otherwise; `steps`: steps to follow, for methods that sample.
    Raises UserError for an unknown method, executor or setting.
    """
    if executors:
        return _compared(
            executors, flags, methods=methods, image=image, classes=classes, device=device, dtype=dtype, steps=steps
        )
    for name in methods:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; there are {', '.join(METHODS)}")
    if image[1] >= IMAGENET_SIZE:
        flags = {"stem": "imagenet", **flags}
    own = {name: {field.name for field in fields(METHODS[name].Settings)} for name in METHODS}
    foreign = [key for key in flags if any(key in own[m] for m in METHODS) and not any(key in own[m] for m in methods)]
    if foreign:
        raise UserError(f"{foreign[0].replace('_', '-')} is a setting of none of the methods {', '.join(methods)}")
    subjects = []
    for name in methods:
        others = set().union(*(own[other] for other in METHODS)) - own[name]
        mine = {key: value for key, value in flags.items() if key not in others}
        plan = resolve({"method": name, "data": "cifar10", **mine})
        if plan.auto_batch:
            raise UserError("the profiler needs a number of images: give --fit SIZE to find the largest batch")
        subjects.append(search_step(plan, classes, image, device, dtype=dtype, steps=steps))
    return subjects


def _compared(executors: Sequence[str], flags: Mapping[str, Any], **more: Any) -> list[Subject]:
    for name in executors:
        if name not in EXECUTORS:
            raise UserError(
                f"unknown executor {name!r}{did_you_mean(name, EXECUTORS)}; there are {', '.join(EXECUTORS)}"
            )
    columns = [
        [replace(step, name=f"{step.name}, {name}") for step in method_steps({**flags, "executor": name}, **more)]
        for name in executors
    ]
    return [step for of_method in zip(*columns, strict=True) for step in of_method]


def module_step(
    build: Callable[[], nn.Module],
    *,
    image: tuple[int, ...] = (3, 32, 32),
    batch_size: int = 64,
    name: str | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """The training step of any module on inputs [batch, *image]; `build` makes the module (a class will do).

    Its output is taken as logits when it is [B, classes], else its mean is the loss. The optimiser is SGD with
    momentum.
    """

    def training(device: torch.device) -> ModuleTraining:
        return ModuleTraining(build().to(device))

    return Subject(name or getattr(build, "__name__", "module"), training, Inputs(image, batch_size, dtype), device)


def load_factory(text: str) -> Callable[[], nn.Module]:
    """The function of "package.module:function", looked for in the working directory too. Raises UserError."""
    module_name, _, function = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--module must be package.module:function, got {text!r} ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    return factory


def format_table(rows: Sequence[Row], limit: str | None = None) -> str:
    """The rows as text, a column for each; 1 GB = 10^9 bytes."""
    first = [row.predicted for row in rows]
    lines: list[tuple[str, list[str]]] = [
        ("", [f.name for f in first]),
        ("batch size", [str(f.batch_size) for f in first]),
        ("predicted peak", [format_size(f.peak) for f in first]),
        ("  reached in", [f.peak_phase for f in first]),
    ]
    for category in first[0].at_peak:
        if any(f.at_peak[category] for f in first):
            lines.append((f"  {category}", [format_size(f.at_peak[category]) for f in first]))
    lines.append(("saved by one pass", [format_size(f.saved_bytes) for f in first]))
    if any(row.measured for row in rows):
        measured = [row.measured for row in rows]
        lines += [
            ("measured peak", ["" if m is None else format_size(m.peak) for m in measured]),
            ("  error of prediction", ["" if row.error is None else f"{row.error:+.2%}" for row in rows]),
            ("  allocator's count", ["" if m is None else format_size(m.allocator_peak or 0) for m in measured]),
            ("time of a step", ["" if m is None else f"{m.seconds:.3f} s" for m in measured]),
        ]
    lines += [
        ("GFLOP of a step", [f"{sum(f.flops.values()) / 1e9:,.1f}" for f in first]),
        ("parameters", [f"{f.parameters:,}" for f in first]),
    ]
    if limit:
        lines.append((f"batch within {limit}", ["none" if row.fits is None else str(row.fits) for row in rows]))
    return _align(lines)


def format_saved(rows: Sequence[Row], by: str) -> str:
    """Saved activations of the largest pass, by "cell", "edge" or "candidate"."""
    parts = [getattr(row.predicted.largest_pass, f"by_{by}", {}) for row in rows]
    names = dict.fromkeys(name for part in parts for name in part)
    lines = [(f"saved by {by}", [row.predicted.name for row in rows])]
    lines += [(name, [format_size(part.get(name, 0)) for part in parts]) for name in names]
    return _align(lines)


def _align(lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    left = max(len(name) for name, _ in lines)
    widths = [max(len(text) for text in column) for column in zip(*(texts for _, texts in lines), strict=True)]
    return "\n".join(
        name.ljust(left) + "".join("  " + text.rjust(width) for text, width in zip(texts, widths, strict=True))
        for name, texts in lines
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.profile",
        usage="%(prog)s [--methods LIST] [--batch-size N] [--fit SIZE] [--measure] [other settings]",
        description="Predict the memory of a search step, method by method, without running it: for any batch, image "
        "and device. Each method has its paper's settings for CIFAR-10 unless flags say otherwise.",
        epilog="docs/profiler.md says what is counted. 1 GB = 10^9 bytes, 1 GiB = 2^30 bytes.",
    )
    parser.add_argument("--methods", default=",".join(DEFAULT_METHODS), help="comma-separated [%(default)s]")
    parser.add_argument("--space", choices=SPACES, default=argparse.SUPPRESS, help="search space [each method's own]")
    parser.add_argument("--executors", metavar="LIST", help="compare these: plain,fused,lean instead of one --executor")
    parser.add_argument("--module", metavar="PKG:FUNCTION", help="profile the module that this function makes instead")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels [32]")
    parser.add_argument("--in-channels", type=int, default=3, help="channels of the images [3]")
    parser.add_argument("--classes", type=int, default=10, help="classes [10]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and maps [float32]")
    parser.add_argument(
        "--device", default="auto", help="where it shall run: cpu or cuda, which need not be here [auto]"
    )
    parser.add_argument("--steps", type=int, default=1, help="steps to follow, for methods that sample [1]")
    parser.add_argument("--fit", metavar="SIZE", help="find the largest batch within a size such as 12GiB")
    parser.add_argument("--measure", action="store_true", help="run the step too and compare")
    parser.add_argument("--by", choices=("cell", "edge", "candidate"), help="print what is saved by these")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - is standard output")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="write a picture that compares the peaks (SVG)")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="write a picture of memory over the step (SVG)")
    parser.add_argument("--snapshot", type=Path, metavar="FILE", help="CUDA, with --measure: PyTorch's memory snapshot")
    add_flags(parser.add_argument_group("network and weights"), WeightSettings)
    add_flags(parser.add_argument_group("settings of the methods"), *_settings())
    return parser


def _settings() -> list[type]:
    return [method.Settings for method in METHODS.values()]


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    check_positive(arguments, "image_size", "in_channels", "classes", "steps")
    device = _device(arguments.device, needed=arguments.measure)
    if arguments.snapshot and not (arguments.measure and device.type == "cuda"):
        raise UserError("--snapshot needs --measure on a CUDA device: drop it")
    limit = parse_size(arguments.fit) if arguments.fit else None
    rows = [_profile(subject, arguments, limit) for subject in _subjects(arguments, device)]

    if arguments.json:
        report = {"command": f"python -m fastnas.profile {' '.join(argv)}", "versions": versions()}
        report |= {"device": str(device), "limit": limit, "rows": [row.as_dict() for row in rows]}
        text = json.dumps(report) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            replace_file(Path(arguments.json), [text.encode()])
    footprints = [footprint for row in rows for footprint in (row.predicted, row.measured) if footprint]
    if arguments.bars:
        replace_file(arguments.bars, [draw_bars(footprints, limit=limit or 0).encode()])
    if arguments.timeline:
        replace_file(arguments.timeline, [draw_timelines([row.predicted for row in rows]).encode()])
    if arguments.json != "-":
        print(format_table(rows, arguments.fit))
        if arguments.by:
            print("\n" + format_saved(rows, arguments.by))


def _device(text: str, *, needed: bool) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {text!r}")
    if needed and text != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--measure needs the device, and there is no {text} here: drop --measure to predict")
    return torch.device(text)


def _subjects(arguments: argparse.Namespace, device: torch.device) -> list[Subject]:
    flags = given(arguments, WeightSettings, *_settings())
    if "space" in arguments:
        flags["space"] = arguments.space
    image = (arguments.in_channels, arguments.image_size, arguments.image_size)
    dtype = DTYPES[arguments.dtype]
    if arguments.executors and (arguments.module or "executor" in flags):
        raise UserError("--executors compares the executors of search methods: drop it, or --executor and --module")
    if arguments.module is None:
        return method_steps(
            flags,
            methods=[name.strip().replace("-", "_") for name in arguments.methods.split(",")],
            executors=[name.strip() for name in (arguments.executors or "").split(",") if name.strip()],
            image=image,
            classes=arguments.classes,
            device=device,
            dtype=dtype,
            steps=arguments.steps,
        )
    batch_size = flags.pop("batch_size", 64)
    if flags:
        raise UserError(f"--{next(iter(flags)).replace('_', '-')} is no setting of a module: drop it or --module")
    factory = load_factory(arguments.module)
    return [module_step(factory, image=image, batch_size=batch_size, device=device, dtype=dtype)]


def _profile(subject: Subject, arguments: argparse.Namespace, limit: int | None) -> Row:
    measured = None
    if arguments.measure:
        if arguments.snapshot:
            torch.cuda.memory._record_memory_history()
        measured = subject.measure()
        if arguments.snapshot:
            torch.cuda.memory._dump_snapshot(str(arguments.snapshot))
    fits = None if limit is None else subject.largest_batch(limit)
    return Row(subject.predict(), measured, fits)


if __name__ == "__main__":
    sys.exit(run_command(main))
