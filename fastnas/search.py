"""`python -m fastnas.search`: search an architecture and leave a run folder with its genotype.

As a library call: `run_search(resolve({"data": "digits", "epochs": 5}), Path("runs/mine"))`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastnas import distributed, processes
from fastnas.cli import ArgumentParser, resumable, run_command
from fastnas.config import WHICH_DATA, add_flags, as_flags, given, merge, option, preset_names, read_preset
from fastnas.data import Data, Split
from fastnas.engine.checkpoint import fits_settings_of, load_checkpoint, save_checkpoint
from fastnas.engine.graphs import capture_steps
from fastnas.engine.huge_pages import SETTLED, collapse_heap
from fastnas.engine.training import Batch, Means, settled_heap
from fastnas.errors import UserError, is_out_of_memory
from fastnas.hashes import run_hashes
from fastnas.memory import SearchMemory
from fastnas.methods import METHODS, Method, Problem, WeightSettings, spaces_of
from fastnas.methods.base import Figure
from fastnas.profiler.step import Inputs
from fastnas.profiler.subject import Subject
from fastnas.progress import Progress
from fastnas.report.cells import describe_cells, draw_cells
from fastnas.report.events import Events
from fastnas.report.run_page import write_report
from fastnas.runs import RunFolder, default_run_path
from fastnas.settings import CHANGEABLE_ON_RESUME, DataSettings, RuntimeSettings, load_data, prepare
from fastnas.spaces import SPACES, AnyGenotype, build_space
from fastnas.spaces.derive import skips_and_edges
from fastnas.timing import MemoryUse, StepTimes

DEFAULT_METHOD = "pc_darts"
AUTO = "auto"


@dataclass(frozen=True)
class SearchSettings:
    method: str = option(DEFAULT_METHOD, "search method", choices=tuple(METHODS))
    space: str = option("darts", "search space", choices=SPACES)  # as it is when a setting is checked
    search_fraction: float = option(
        0.5, "share of the training set that only the architecture learns from", above=0, maximum=0.9
    )
    train_fraction: float | None = option(
        None, "share of the training set that the weights learn from; none takes all the rest", above=0, maximum=1
    )
    tensorboard: bool = option(False, "also write the figures of each epoch as TensorBoard events into the run folder")


@dataclass(frozen=True)
class Plan:
    """A resolved search: every setting, in five groups that share one flat namespace."""

    search: SearchSettings
    data: DataSettings
    weights: WeightSettings
    runtime: RuntimeSettings
    method: Any
    auto_batch: bool = False  # the batch size is found when data and device are known

    def as_mapping(self) -> dict[str, Any]:
        """One flat table, as config.toml keeps it."""
        groups = (self.search, self.data, self.weights, self.runtime, self.method)
        return {key: value for group in groups for key, value in asdict(group).items()}


@dataclass(frozen=True)
class SearchResult:
    genotype: AnyGenotype
    run: RunFolder


def resolve(flags: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Plan:
    """The settings of a search: defaults, then a preset, then `flags`.

    `flags["preset"]` names the preset; without it that is `<method>-<data>` if there is one, else `<method>`. When a
    run is resumed, `base` (its settings) takes the preset's place. The batch size may be "auto": the largest that
    fits, see `fastnas.memory`. Raises UserError for anything unknown or wrong.
    """
    flags = dict(flags)
    preset = flags.pop("preset", None)
    if "method" in flags:
        flags["method"] = str(flags["method"]).replace("-", "_")
    layer = dict(base) if base is not None else _preset(preset, flags)
    name = flags.get("method", layer.get("method", DEFAULT_METHOD))
    space = flags.get("space", layer.get("space", SearchSettings.space))
    merge((SearchSettings,), {"method": name, "space": space})
    if preset is not None and layer.get("method", name) != name:
        raise UserError(f"the preset {preset} is for method {layer['method']}, not {name}: drop --preset or --method")
    groups = (SearchSettings, DataSettings, WeightSettings, RuntimeSettings, METHODS[name].Settings)
    others = {other: method.Settings for other, method in METHODS.items() if other != name}
    if space not in spaces_of(name):
        raise UserError(f"{name} does not search the space {space}: give --space {' or '.join(spaces_of(name))}")
    auto_batch = {**layer, **flags}.get("batch_size") == AUTO
    for chosen in (layer, flags):
        if chosen.get("batch_size") == AUTO:
            del chosen["batch_size"]
    return Plan(*merge(groups, layer, flags, others=others), auto_batch=auto_batch)


def _preset(preset: str | None, flags: Mapping[str, Any]) -> Mapping[str, Any]:
    if preset is not None:
        layer = read_preset(preset)
        if preset in preset_names() and "method" not in layer:
            raise UserError(f"the preset {preset} is for python -m fastnas.retrain, not for a search: give another")
        return layer
    method = flags.get("method", DEFAULT_METHOD)
    data = str(flags.get("data", DataSettings.data)).partition(":")[0]
    names = [name for name in (f"{method}-{data}", str(method)) if name in preset_names()]
    return read_preset(names[0]) if names else {}


def build_method(plan: Plan, classes: int, in_channels: int, device: torch.device, image_size: int = 32) -> Method:
    """The method of a plan: `classes` classes, images of `in_channels` channels and `image_size` pixels a side."""
    space = build_space(plan.search.space, nodes=plan.weights.nodes, cells=plan.weights.cells)
    problem = Problem(space, classes, in_channels, plan.weights, device, plan.runtime.seed, image_size)
    return METHODS[plan.search.method](plan.method, problem)


def search_step(
    plan: Plan,
    classes: int,
    image: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 1,
) -> Subject:
    """The step of a planned search as the profiler takes it, on images [C, H, W].

    It is a step of the last epoch, when no phase of warming up is left.
    """

    def build(device: torch.device) -> Method:
        method = build_method(plan, classes, image[0], device, image[1])
        method.start_epoch(plan.weights.epochs - 1)
        return method

    return Subject(plan.search.method, build, Inputs(image, plan.weights.batch_size, dtype, steps), device)


def _with_fitting_batch(plan: Plan, memory: SearchMemory, images: int) -> Plan:
    """The plan with a number where its batch size is `auto`."""
    count = processes.world_size()
    batch_size = distributed.smallest(memory.automatic_batch(images // count) or 0)
    if not batch_size:
        raise UserError("no batch fits into the free memory: give fewer --channels or --cells")
    return replace(plan, weights=replace(plan.weights, batch_size=count * batch_size), auto_batch=False)


def _memory(plan: Plan, classes: int, image: tuple[int, ...], device: torch.device) -> SearchMemory:
    """The memory of one process's part of a planned search."""
    part = replace(plan.weights, batch_size=plan.weights.batch_size // processes.world_size())
    return SearchMemory(search_step(replace(plan, weights=part), classes, image, device), part)


def run_search(plan: Plan, out: Path | None = None, *, resume: Path | None = None, quiet: bool = False) -> SearchResult:
    """Search, with a checkpoint after each epoch; a killed run goes on from its last whole epoch, bit for bit.

    `out`: the run folder to make (default: a new one under `runs/`); `resume`: the folder of a run to go on with,
    from the start when it was stopped before its first checkpoint.
    Warns when the predicted memory exceeds what is free. Raises UserError for settings that do not fit the data,
    when the loss stops being a number, and when memory runs out.
    """
    device = prepare(plan.runtime)
    if plan.weights.storage != "float32" and device.type != "cuda":
        raise UserError(
            f"storage {plan.weights.storage} is for GPUs, and this search runs on {device.type}: drop --storage"
        )
    data = load_data(
        plan.data,
        plan.runtime,
        device,
        search_fraction=plan.search.search_fraction,
        train_fraction=plan.search.train_fraction,
    )
    image = (data.channels, data.image_size, data.image_size)
    memory = _memory(plan, data.num_classes, image, device)
    if plan.auto_batch:
        plan = _with_fitting_batch(plan, memory, len(data.train))
        if not quiet and processes.is_main():
            print(f"batch size  {plan.weights.batch_size}", file=sys.stderr)
        memory = _memory(plan, data.num_classes, image, device)
    memory.warn()
    try:
        return _search(plan, data, device, out, resume=resume, quiet=quiet)
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: {memory.explain()}") from error
        raise


def _search(
    plan: Plan, data: Data, device: torch.device, out: Path | None, *, resume: Path | None, quiet: bool
) -> SearchResult:
    method = build_method(plan, data.num_classes, data.channels, device, data.image_size)
    batch_size, seed = plan.weights.batch_size, plan.runtime.seed
    train_stream = data.train.stream(batch_size, seed=seed, **processes.share())
    count = processes.world_size()
    search_batch = max(count, min(batch_size, len(data.search) // count * count))
    search_stream = data.search.stream(search_batch, seed=seed, **processes.share())

    run, first_epoch = _new_run(plan, data, method, out) if resume is None else _resumed_run(plan, method, resume)
    settings = [asdict(group) for group in (plan.search, plan.weights, plan.method)]
    same = {"settings": settings, "labels": data.train.labels, "state": method.state_dict()}
    distributed.check_start(same, batch_size, quiet=quiet)
    steps = len(train_stream)
    train_batches = train_stream.from_step(first_epoch * steps)
    search_batches = search_stream.from_step(first_epoch * steps)
    times, memory = StepTimes(), MemoryUse(device)
    with (
        settled_heap(),
        Events(run.path, on=plan.search.tensorboard, epoch=first_epoch) as events,
        Progress(plan.weights.epochs, steps, start_epoch=first_epoch, quiet=quiet) as progress,
    ):
        capture_steps(method, progress.message)
        times.watch(method)
        for epoch in range(first_epoch, plan.weights.epochs):
            started = time.perf_counter()
            times.clear()
            memory.clear()
            progress.start_epoch(epoch)
            method.start_epoch(epoch)
            means = Means()
            for index in range(epoch * steps, (epoch + 1) * steps):
                with times.part("data"):
                    batches = next(train_batches), next(search_batches)
                with times.part("step"):
                    figures = method.step(index, *batches)
                means.add(figures)
                progress.step(figures)
                if index == first_epoch * steps + SETTLED:
                    collapse_heap()
            record = {"epoch": epoch, **means.read()}
            trained = time.perf_counter()
            distributed.average_statistics(method.state_dict())
            record |= method.end_epoch(_Passes(data.search, batch_size))
            _check_finite(record, run)
            distributed.check_replicas(method.state_dict(), epoch)
            genotype = method.derive()
            cells = skips_and_edges(genotype)
            record = {f"skips_{kind}": skips for kind, (skips, _) in cells.items()} | record
            if "normal" in cells:
                _warn_of_collapse(record["skips_normal"], cells["normal"][1], progress)
            run.append_metrics(record | {"genotype": genotype.notation()})
            seconds = {"train_s": trained - started, **times.split(), "evaluate_s": time.perf_counter() - trained}
            timing = {"epoch": epoch, **seconds, **memory.read()}
            run.append_timing(timing)
            events.add(epoch, record, timing)
            run.write_genotype(genotype)
            _save(run, epoch, method)
            progress.end_epoch(record)
    genotype = method.derive()
    run.write_genotype(genotype)
    run.write_cells(draw_cells(genotype))
    try:
        write_report(run.path)
    except Exception as error:  # the search itself is done and saved
        again = f"python -m fastnas.report {shlex.quote(str(run.path))}"
        warnings.warn(f"the report could not be made ({error}); make it with: {again}", stacklevel=2)
    return SearchResult(genotype, run)


def _new_run(plan: Plan, data: Data, method: Method, out: Path | None) -> tuple[RunFolder, int]:
    """A folder with the settings and the state at the start, and the first epoch."""
    config = plan.as_mapping() | {"hashes": run_hashes(plan.as_mapping(), data)}
    run = RunFolder.create(out or default_run_path(plan.search.method, plan.data.data), config)
    _save(run, -1, method)
    return run, 0


def _resumed_run(plan: Plan, method: Method, folder: Path) -> tuple[RunFolder, int]:
    """The run in `folder`, its state loaded, and the epoch that comes next; what came after its checkpoint is cut."""
    run = RunFolder.open(folder)
    state = load_checkpoint(run.checkpoint_path, method=plan.search.method)
    with fits_settings_of(run.path):
        method.load_state_dict(state["method"])
    torch.set_rng_state(state["rng"])
    run.truncate(state["epoch"])
    return run, state["epoch"] + 1


def _check_finite(record: Mapping[str, Any], run: RunFolder) -> None:
    """Raise UserError, and note it in the run, when a figure of the epoch is no number."""
    broken = [name.replace("_", " ") for name, value in record.items() if not _is_finite(value)]
    if broken:
        run.append_timing({"epoch": record["epoch"], "stopped": f"{broken[0]} is no longer a number"})
        raise UserError(
            f"{broken[0]} is no longer a number in epoch {record['epoch'] + 1}: start again with a smaller --lr; "
            f"the epochs before it are in {run.path}"
        )


def _warn_of_collapse(skips: float, edges: int, progress: Progress) -> None:
    if skips > edges / 2:
        progress.message(
            f"warning: {skips:.0f} of {edges} edges of the normal cell are skip connections, a sign of collapse: take "
            "the genotype of an earlier epoch from metrics.jsonl, or cap them with --max-skips (DARTS, PC-DARTS)"
        )


class _Passes:
    """A split that can be gone through again and again, in order and without augmentation; of several processes each
    gets its part."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size = split, batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self.split.batches(self.batch_size, **processes.share())


def _is_finite(value: Figure) -> bool:
    return all(map(_is_finite, value)) if isinstance(value, list) else math.isfinite(value)


def _save(run: RunFolder, epoch: int, method: Method) -> None:
    """Checkpoint after `epoch`; -1 is before the first one, so that a run killed in it can be resumed too."""
    state = {"epoch": epoch, "method": method.state_dict(), "rng": torch.get_rng_state()}
    save_checkpoint(run.checkpoint_path, state, method=method.name)


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--quiet` and all settings of a search and of the methods; `given_settings` reads them."""
    parser.add_argument("--preset", help="settings of a paper or a data set, by name, or the path of a .toml file")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_flags(parser, SearchSettings)
    add_flags(parser.add_argument_group("data"), DataSettings)
    add_flags(parser.add_argument_group("network and weights"), WeightSettings)
    add_flags(parser.add_argument_group("machine"), RuntimeSettings)
    methods = [method.Settings for method in METHODS.values()]
    add_flags(parser.add_argument_group("settings of the methods"), *methods)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, as `resolve` takes them."""
    methods = [method.Settings for method in METHODS.values()]
    flags = given(arguments, SearchSettings, DataSettings, WeightSettings, RuntimeSettings, *methods)
    return flags if arguments.preset is None else flags | {"preset": arguments.preset}


def build_parser() -> ArgumentParser:
    names = [name for name in preset_names() if "method" in read_preset(name)]
    parser = ArgumentParser(
        prog="python -m fastnas.search",
        usage="%(prog)s [--method METHOD] [--data DATA] [--preset PRESET] [other settings]",
        description="Search an architecture by weight sharing. Without arguments: PC-DARTS on a small embedded data "
        "set of handwritten digits, a few minutes on a laptop.",
        epilog="Settings come from their defaults, then from a preset, then from flags; the default in brackets is "
        f"the one without a preset. Presets: {', '.join(names)}. Without --preset the one named "
        "<method>-<data> or <method> is taken.",
    )
    parser.add_argument("--out", type=Path, help="run folder to make [runs/<method>-<data>-<time>]")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="search with N seeds, compare them and keep the best: python -m fastnas.repeat",
    )
    add_search_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if "seeds" in arguments:
        from fastnas import repeat  # it stands on this module

        return repeat.main(argv)
    flags = given_settings(arguments)
    plan = resolve(flags) if arguments.resume is None else _resumed_plan(arguments.resume, flags, out=arguments.out)
    out = arguments.resume or arguments.out or default_run_path(plan.search.method, plan.data.data)
    with resumable("fastnas.search", out):
        result = run_search(plan, out, resume=arguments.resume, quiet=arguments.quiet)
    print(describe_cells(result.genotype))
    print(f"\ngenotype  {result.run.genotype_path}\nreport    {result.run.report_path}\nrun       {result.run.path}")
    genotype, data = shlex.quote(str(result.run.genotype_path)), as_flags(plan.as_mapping(), *WHICH_DATA)
    print(f"next      python -m fastnas.retrain --genotype {genotype} {data}")
    return 0


def _resumed_plan(folder: Path, flags: Mapping[str, Any], *, out: Path | None = None) -> Plan:
    if "preset" in flags or out is not None:
        raise UserError("--resume goes on with a run as it was set up: drop --preset and --out")
    config = RunFolder.open(folder).config()
    if "method" not in config:
        raise UserError(f"{folder} is no search: go on with python -m fastnas.retrain --resume {folder}")
    fixed = sorted(set(flags) - CHANGEABLE_ON_RESUME - {"method"})
    if fixed:
        raise UserError(
            f"--resume goes on with the settings of the run; --{fixed[0].replace('_', '-')} cannot change: drop it, "
            "or start a new run with --out"
        )
    if "method" in flags and flags["method"].replace("-", "_") != config.get("method"):
        raise UserError(
            f"the run in {folder} was searched with method {config.get('method')}, not {flags['method']}: "
            "drop --method, or start a new run with --out"
        )
    config.pop("warm_start", None)  # the checkpoint holds what came from it
    return resolve({key: value for key, value in flags.items() if key != "method"}, config)


if __name__ == "__main__":
    sys.exit(run_command(main, several=True))
