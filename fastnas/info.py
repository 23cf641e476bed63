"""`python -m fastnas.info`: what is installed and in use, or the size of a derived network."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from fastnas import _backends, _ext
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.engine.networks import build_network
from fastnas.engine.stems import STEMS
from fastnas.errors import UserError
from fastnas.latency import measure_latency
from fastnas.profiler.counts import count
from fastnas.runs import versions
from fastnas.spaces import load_genotype

IMAGENET_SIZE = 128  # images from this size on get the ImageNet stem when --stem is not given


def describe_network(
    genotype: str,
    *,
    channels: int,
    cells: int,
    image_size: int,
    classes: int,
    in_channels: int = 3,
    stem: str | None = None,
) -> dict[str, Any]:
    """Parameters and multiply-adds of a derived network for one image, without its auxiliary head.

    `genotype`: published name, file or run folder; `stem`: "cifar" or "imagenet", by default the latter for images of
    at least 128 pixels. Nothing is computed or allocated. Raises UserError for a genotype that cannot be read.
    """
    stem = stem or ("imagenet" if image_size >= IMAGENET_SIZE else "cifar")
    with torch.device("meta"):
        network = build_network(
            load_genotype(genotype),
            channels=channels,
            cells=cells,
            classes=classes,
            in_channels=in_channels,
            stem=stem,
        )
    counts = count(network, (in_channels, image_size, image_size))
    return {
        "genotype": genotype,
        "channels": channels,
        "cells": cells,
        "image_size": image_size,
        "classes": classes,
        "stem": stem,
        "parameters": counts.parameters,
        "multiply_adds": counts.multiply_adds,
        "multiply_adds_all": counts.multiply_adds_all,
        "convention": counts.convention,
    }


def describe_latency(facts: dict[str, Any], in_channels: int, batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of each batch, for the network of `describe_network` with random weights on the device at hand.

    A GPU is taken where there is one. Keys: `device`, `threads` of the CPU, and `latency`, one entry a batch size.
    """
    on_gpu = torch.cuda.is_available()
    keys = ("channels", "cells", "classes", "stem")
    network = build_network(
        load_genotype(facts["genotype"]), in_channels=in_channels, **{key: facts[key] for key in keys}
    )
    image = (in_channels, facts["image_size"], facts["image_size"])
    results = measure_latency(network, image, batch_sizes, device="cuda" if on_gpu else "cpu")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "latency": [asdict(result) for result in results],
    }


def describe_installation() -> str:
    """Versions, devices, built parts, and the backend that serves each op, as text."""
    lines = [f"{name:<12}{version}" for name, version in versions().items()]
    for package in ("torchvision", "triton", "numpy"):
        lines.append(f"{package:<12}{_version(package)}")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    lines += ["", f"{'cpu':<12}{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            size = f"{device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}"
            lines.append(f"{f'cuda:{index}':<12}{device.name}, {size}")
    else:
        lines.append(f"{'cuda':<12}none visible (torch was built for CUDA {torch.version.cuda})")

    facts = _ext.build_facts()
    lines += ["", f"{'fastnas._C':<12}{_ext.load('cpu') or 'loaded: ' + _ext.modules()['cpu']}"]
    if facts:
        lines.append(f"{'  built with':<12} torch {facts['torch']}, {facts['compiler'] or 'no compiler'}")
        cuda = f"yes: {_ext.load('cuda') or 'loaded'}" if facts["cuda"] else f"no: {facts['cuda_reason']}"
        lines.append(f"{'  CUDA part':<12} {cuda}")
    rows = _backends.table()
    width = max(len(row.op) for row in rows) + 2
    lines += ["", f"{'op':<{width}}{'device':<8}{'backend':<11}why"]
    lines += [f"{row.op:<{width}}{row.device:<8}{row.backend:<11}{row.reason}" for row in rows]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.info",
        description="Print versions, devices, built parts and which backend serves each op. With --genotype: the "
        "parameters and multiply-adds of that derived network for one image of --image-size, with the convention, "
        "as one JSON line.",
    )
    parser.add_argument("--genotype", help="published name, file or run folder")
    parser.add_argument("--channels", type=int, default=36, help="channels of the first cells' nodes [36]")
    parser.add_argument("--cells", type=int, default=20, help="cells of the network [20]")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels [32]")
    parser.add_argument("--classes", type=int, default=10, help="classes [10]")
    parser.add_argument("--in-channels", type=int, default=3, help="channels of the images [3]")
    parser.add_argument(
        "--latency",
        metavar="BATCHES",
        help="with --genotype: also time it on the device at hand; batch sizes, as in 1,32",
    )
    parser.add_argument("--stem", choices=STEMS, help=f"[imagenet for images of at least {IMAGENET_SIZE}, else cifar]")
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.genotype is None:
        print(describe_installation())
        return
    check_positive(arguments, "cells", "image_size", "classes", "in_channels")
    given = {key: value for key, value in vars(arguments).items() if key not in ("genotype", "debug", "latency")}
    facts = describe_network(arguments.genotype, **given)
    if arguments.latency is not None:
        facts |= describe_latency(facts, arguments.in_channels, _batch_sizes(arguments.latency))
    print(json.dumps(facts))


def _batch_sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"latency takes batch sizes with commas between them, such as 1,32, got {text!r}")
    return [int(size) for size in sizes]


if __name__ == "__main__":
    sys.exit(run_command(main))
