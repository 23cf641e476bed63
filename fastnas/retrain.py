"""`python -m fastnas.retrain --genotype FILE|NAME`: train a derived network from scratch, test it once.

As a library call: `run_retrain(resolve({"genotype": "DARTS_V2", "data": "digits"}), Path("runs/mine"))`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import distributed, processes
from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, resumable, run_command
from fastnas.config import WHICH_DATA, add_flags, as_flags, given, merge, option, preset_names, read_preset, read_toml
from fastnas.data import Data
from fastnas.engine import networks
from fastnas.engine.checkpoint import fits_settings_of, load_checkpoint, save_checkpoint
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.huge_pages import SETTLED, collapse_heap
from fastnas.engine.retraining import PRECISIONS, Arithmetic, WeightAverage
from fastnas.engine.stems import STEMS
from fastnas.engine.training import (
    SCHEDULES,
    Means,
    accuracy,
    average_gradients,
    evaluate,
    learning_rate,
    set_learning_rate,
)
from fastnas.errors import UserError
from fastnas.hashes import run_hashes
from fastnas.profiler.counts import Counts
from fastnas.progress import Progress
from fastnas.report.cells import draw_cells
from fastnas.runs import RunFolder, default_run_path
from fastnas.settings import CHANGEABLE_ON_RESUME, DataSettings, RuntimeSettings, load_data, prepare
from fastnas.spaces import load_genotype
from fastnas.trained import CHECKPOINT_KIND, NetworkCard, write_card


@dataclass(frozen=True)
class RetrainSettings:
    """The defaults are those of DARTS on CIFAR-10 (Liu et al. 2019, appendix A.2)."""

    genotype: str = option("", "genotype: a run folder, a JSON or tuple-notation file, or a published name")
    epochs: int = option(600, "passes over the training set", minimum=1)
    batch_size: int = option(96, "images a step; batch normalisation needs two", minimum=2)
    channels: int = option(36, "channels of the first cells' nodes; doubled at each reduction cell", minimum=2)
    cells: int = option(20, "cells of the network", minimum=1)
    stem: str = option("cifar", "layers before the first cell: full size, or three strides of 2", choices=STEMS)
    lr: float = option(0.025, "learning rate at the start", above=0)
    lr_min: float = option(0.0, "learning rate that the cosine schedule ends at", minimum=0)
    momentum: float = option(0.9, "momentum of SGD", minimum=0, maximum=1)
    weight_decay: float = option(3e-4, "L2 penalty of the weights", minimum=0)
    schedule: str = option("cosine", "how the learning rate falls", choices=SCHEDULES)
    lr_warmup_epochs: int = option(0, "epochs in which the rate rises linearly before that", minimum=0)
    grad_clip: float = option(5.0, "largest norm of the gradient", above=0)
    label_smoothing: float = option(0.0, "share of the label spread over all classes", minimum=0, maximum=0.99)
    ema: float = option(0.0, "decay of the averaged weights that are tested; 0 keeps none", minimum=0, maximum=0.99999)
    auxiliary_weight: float = option(0.4, "weight of the auxiliary head's loss; 0 leaves the head out", minimum=0)
    drop_path: float = option(0.2, "rate of drop path at the end; it rises linearly from 0", minimum=0, maximum=0.99)
    max_multiply_adds: float | None = option(
        None, "refuse a network with more, counted on one image of the data; none sets no limit", above=0
    )
    precision: str = option("float32", "what passes are computed in; weights stay float32", choices=PRECISIONS)
    fused: bool | None = option(
        None, "train ReLU, convolution and normalisation as one step, in float32; none: on the CPU, where it is faster"
    )
    channels_last: bool | None = option(None, "layout of maps and weights; none: on the CPU, where it is faster")


@dataclass(frozen=True)
class Plan:
    retrain: RetrainSettings
    data: DataSettings
    runtime: RuntimeSettings

    def as_mapping(self) -> dict[str, Any]:
        """One flat table, as config.toml keeps it."""
        return {key: value for group in asdict(self).values() for key, value in group.items()}


@dataclass(frozen=True)
class RetrainResult:
    """Test figures of the last epoch's network; the test set is read once, after training."""

    test_accuracy: float
    test_loss: float
    parameters: int
    multiply_adds: int
    run: RunFolder


def resolve(flags: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Plan:
    """Settings from defaults, a preset (`retrain-<data>` if there is one, else `retrain`), then `flags`."""
    flags = dict(flags)
    preset = flags.pop("preset", None)
    if base is None:
        data = str(flags.get("data", DataSettings.data)).partition(":")[0]
        base = read_preset(preset or next(n for n in (f"retrain-{data}", "retrain") if n in preset_names()))
        if "method" in base:
            raise UserError(f"the preset {preset} is for python -m fastnas.search, not for retraining: give another")
    plan = Plan(*merge((RetrainSettings, DataSettings, RuntimeSettings), base, flags))
    if not plan.retrain.genotype:
        raise UserError(
            "which genotype? give --genotype with a run folder, a file, or a published name such as DARTS_V2"
        )
    return plan


def build_network(plan: Plan, classes: int, in_channels: int) -> nn.Module:
    """The derived network of a plan, without its auxiliary head when that has no weight."""
    settings = plan.retrain
    return networks.build_network(
        load_genotype(settings.genotype),
        channels=settings.channels,
        cells=settings.cells,
        classes=classes,
        in_channels=in_channels,
        stem=settings.stem,
        auxiliary=settings.auxiliary_weight > 0,
    )


def run_retrain(
    plan: Plan, out: Path | None = None, *, resume: Path | None = None, quiet: bool = False
) -> RetrainResult:
    """Train from scratch on the whole training set, then measure on the test set, once.

    Checkpoints and resuming work as in `fastnas.search.run_search`. Raises UserError for wrong settings.
    """
    settings = plan.retrain
    device = prepare(plan.runtime)
    data = load_data(plan.data, plan.runtime, device)
    card = _card(settings, data)
    counts = card.counts()
    _check_size(settings, counts)
    training = _Training(plan, data, device)
    stream = data.train_and_search.stream(settings.batch_size, seed=plan.runtime.seed, **processes.share())
    if resume is None:
        run, first_epoch = _new_run(plan, data, card, training, out), 0
    else:
        run, first_epoch = _resumed_run(training, resume)

    same = {"settings": asdict(settings), "labels": data.train_and_search.labels, "state": training.state_dict()}
    distributed.check_start(same, settings.batch_size, quiet=quiet)
    steps = len(stream)
    batches = stream.from_step(first_epoch * steps)
    with Progress(settings.epochs, steps, start_epoch=first_epoch, quiet=quiet) as progress:
        for epoch in range(first_epoch, settings.epochs):
            started = time.perf_counter()
            progress.start_epoch(epoch)
            training.start_epoch(epoch)
            means = Means()
            for index in range(epoch * steps, (epoch + 1) * steps):
                figures = training.step(index, *next(batches))
                means.add(figures)
                progress.step(figures)
                if index == first_epoch * steps + SETTLED:
                    collapse_heap()
            record = {"epoch": epoch, **means.read()}
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"the training loss is no longer a number in epoch {epoch + 1}: start again with a smaller --lr; "
                    f"the epochs before it are in {run.path}"
                )
            training.end_epoch(epoch)
            run.append_metrics(record)
            run.append_timing({"epoch": epoch, "train_s": time.perf_counter() - started})
            _save(run, epoch, training)
            progress.end_epoch(record)

    figures = evaluate(training.tested(), data.test.batches(settings.batch_size, **processes.share()))
    result = RetrainResult(figures["accuracy"], figures["loss"], counts.parameters, counts.multiply_adds, run)
    summary = {key: value for key, value in vars(result).items() if key != "run"}
    replace_file(run.path / "result.json", [(json.dumps(summary) + "\n").encode()])
    return result


class _Training:
    """A network, its optimiser and, with `--ema`, its averaged weights: what a step changes and a checkpoint holds."""

    def __init__(self, plan: Plan, data: Data, device: torch.device) -> None:
        self.settings = settings = plan.retrain
        self.seed = plan.runtime.seed
        self.arithmetic = Arithmetic.choose(
            device, fused=settings.fused, channels_last=settings.channels_last, precision=settings.precision
        )
        self.network = self.arithmetic.prepare(build_network(plan, data.num_classes, data.channels))
        self.of_cells = isinstance(self.network, DerivedNetwork)
        self.average = WeightAverage(self.network, settings.ema) if settings.ema else None
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )
        self.cross_entropy = partial(F.cross_entropy, label_smoothing=settings.label_smoothing)

    def start_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch: the learning rate, drop path and its random numbers."""
        settings = self.settings
        # Drop path draws from PyTorch's generator: seeded by the epoch, so that resuming needs no state of it, and
        # by the rank, whose images are others.
        torch.manual_seed(((self.seed + (processes.rank() << 32)) * 1_000_003 + epoch) % 2**63)
        rate = learning_rate(
            epoch,
            settings.epochs,
            settings.lr,
            settings.lr_min,
            schedule=settings.schedule,
            warmup=settings.lr_warmup_epochs,
        )
        set_learning_rate(self.optimizer, rate)
        self.network.train()
        if self.of_cells:
            self.network.set_drop_path(settings.drop_path * epoch / settings.epochs)

    def step(self, index: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One SGD step, `index` counted over the whole training; loss and accuracy of the main classifier."""
        x = self.arithmetic.images(x)
        with self.arithmetic.autocast():
            logits, auxiliary = self.network.forward_with_auxiliary(x) if self.of_cells else (self.network(x), None)
        loss = self.cross_entropy(logits.float(), y)
        figures = {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), y)}
        if auxiliary is not None:
            loss = loss + self.settings.auxiliary_weight * self.cross_entropy(auxiliary.float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(list(self.network.parameters()))
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network, index)
        return figures

    def end_epoch(self, epoch: int) -> None:
        """Make the running statistics of all processes one, and see that nothing else differs."""
        replicas = {"network": self.network.state_dict(), "average": {} if self.average is None else self.average.state}
        for state in replicas.values():
            distributed.average_statistics(state)
        distributed.check_replicas(replicas, epoch)

    def tested(self) -> nn.Module:
        """The network in evaluation, with the averaged weights if there are any."""
        if self.average is not None:
            self.network.load_state_dict(self.average.state)
        return self.network.eval()

    def state_dict(self) -> dict[str, Any]:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.average is None else state | {"ema": self.average.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load(state["ema"])


def _new_run(plan: Plan, data: Data, card: NetworkCard, training: _Training, out: Path | None) -> RunFolder:
    """A folder with the settings, the genotype and the state at the start."""
    hashed = plan.as_mapping() | {"genotype": card.genotype.to_json()}
    run = RunFolder.create(
        out or default_run_path("retrain", plan.data.data), plan.as_mapping() | {"hashes": run_hashes(hashed, data)}
    )
    run.write_genotype(card.genotype)
    run.write_cells(draw_cells(card.genotype))
    write_card(run.path, card)
    _save(run, -1, training)
    return run


def _resumed_run(training: _Training, folder: Path) -> tuple[RunFolder, int]:
    """The run in `folder`, its state loaded, and the epoch that comes next; what came after its checkpoint is cut."""
    run = RunFolder.open(folder)
    state = load_checkpoint(run.checkpoint_path, method=CHECKPOINT_KIND)
    with fits_settings_of(run.path):
        training.load_state_dict(state)
    run.truncate(state["epoch"])
    return run, state["epoch"] + 1


def _warn_of_other_data(plan: Plan, flags: Mapping[str, Any]) -> None:
    """Warn when no data was asked for, and the genotype comes from a run on other data than the default."""
    path = Path(plan.retrain.genotype)
    config = (path if path.is_dir() else path.parent) / "config.toml"
    if "data" in flags or not config.exists():
        return
    searched = read_toml(config)
    if searched.get("data") not in (None, plan.data.data):
        same = as_flags(searched, *WHICH_DATA)
        warnings.warn(
            f"{path} was searched on {searched['data']}, and this trains on {plan.data.data}: for the same give {same}",
            stacklevel=2,
        )


def _card(settings: RetrainSettings, data: Data) -> NetworkCard:
    return NetworkCard(
        load_genotype(settings.genotype),
        settings.channels,
        settings.cells,
        settings.stem,
        data.num_classes,
        data.channels,
        data.image_size,
        data.mean,
        data.std,
    )


def _check_size(settings: RetrainSettings, counts: Counts) -> None:
    limit = settings.max_multiply_adds
    if limit is not None and counts.multiply_adds > limit:
        raise UserError(
            f"the network has {counts.multiply_adds:,} multiply-adds an image, more than the {limit:,.0f} of "
            "--max-multiply-adds: give fewer --channels or --cells, smaller images, or another limit"
        )


def _save(run: RunFolder, epoch: int, training: _Training) -> None:
    """Checkpoint after `epoch`; -1 is before the first one."""
    save_checkpoint(run.checkpoint_path, {"epoch": epoch, **training.state_dict()}, method=CHECKPOINT_KIND)


def add_retraining_flags(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--quiet` and all settings of retraining; `given_settings` reads them."""
    parser.add_argument("--preset", help="settings of retraining, by name, or the path of a .toml file")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_flags(parser, RetrainSettings)
    add_flags(parser.add_argument_group("data"), DataSettings)
    add_flags(parser.add_argument_group("machine"), RuntimeSettings)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, as `resolve` takes them."""
    flags = given(arguments, RetrainSettings, DataSettings, RuntimeSettings)
    return flags if arguments.preset is None else flags | {"preset": arguments.preset}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.retrain",
        usage="%(prog)s --genotype GENOTYPE [--data DATA] [--preset PRESET] [other settings]",
        description="Train the network that a search derived, from scratch on the whole training set, and report its "
        "test accuracy. The test set is read once, after the last epoch.",
        epilog="Settings come from their defaults, then from a preset, then from flags. Without --preset that is "
        "retrain-<data> if there is one, else retrain (the papers' 600 epochs on CIFAR-10).",
    )
    parser.add_argument("--out", type=Path, help="run folder to make [runs/retrain-<data>-<time>]")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    add_retraining_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    flags = given_settings(arguments)
    if arguments.resume is None:
        plan = resolve(flags)
    else:
        if arguments.out is not None or set(flags) - CHANGEABLE_ON_RESUME:
            raise UserError("--resume goes on with a run as it was set up: drop the flags that would change it")
        run = RunFolder.open(arguments.resume)
        config = run.config()
        if "genotype" not in config:
            raise UserError(
                f"{run.path} is a search: go on with python -m fastnas.search --resume {run.path}, "
                f"or train its network with --genotype {run.path}"
            )
        plan = resolve(flags, config | {"genotype": str(run.genotype_path)})
    _warn_of_other_data(plan, flags)
    out = arguments.resume or arguments.out or default_run_path("retrain", plan.data.data)
    with resumable("fastnas.retrain", out):
        result = run_retrain(plan, out, resume=arguments.resume, quiet=arguments.quiet)
    print(f"test accuracy  {result.test_accuracy:.2%}\nparameters     {result.parameters:,}")
    print(f"multiply-adds  {result.multiply_adds:,} an image")
    print(
        f"run            {result.run.path}\nnext           python -m fastnas.export {shlex.quote(str(result.run.path))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, several=True))
