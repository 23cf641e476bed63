"""`python -m fastnas.export RUN`: a trained network as ONNX, as a torch.export program and as safetensors.

As library calls: `export_network("runs/mine")`; for any network of yours `export_onnx(network, (3, 32, 32), path)` and
its like.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.cli import ArgumentParser, run_command
from fastnas.errors import UserError
from fastnas.trained import NetworkCard, load_network, read_card

TOLERANCE = 1e-4  # largest difference of a logit from PyTorch's
CHECKED_BATCHES = (1, 3)  # neither is the batch that is traced
TRACED_BATCH = 2
KEY = "fastnas"  # of the metadata
FORMATS = ("onnx", "torch-export", "safetensors")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}


def export_torch(network: nn.Module, image: Sequence[int], path: Path) -> float:
    """Write `network` as a program of torch.export, and give its largest difference from the network.

    `image`: shape [C, H, W] of one image; the program takes any batch of at least 1. It is read back with
    `torch.export.load(path).module()`, without fastnas. Raises UserError when a logit differs by more than TOLERANCE.
    """
    images = torch.zeros(TRACED_BATCH, *image)
    with torch.no_grad(), _without_warnings():
        program = torch.export.export(
            network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    return _checked(path, network, image, loaded)


def export_onnx(network: nn.Module, image: Sequence[int], path: Path, metadata: str = "") -> float:
    """Write `network` as ONNX, run it in ONNX Runtime, and give its largest difference from PyTorch.

    Input `images` float32 [batch, C, H, W], output `logits` [batch, classes], any batch. `metadata`: text kept in the
    model's properties under "fastnas". Raises UserError when onnx, onnxscript or onnxruntime is not installed, or when
    a logit differs by more than TOLERANCE: the file is then removed.
    """
    for package in ("onnx", "onnxscript"):
        _extra(package)
    runtime = _extra("onnxruntime")
    images = torch.zeros(TRACED_BATCH, *image)
    with torch.no_grad(), _without_warnings():
        program = torch.onnx.export(
            network.eval(),
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    assert program is not None
    program.model.metadata_props[KEY] = metadata
    program.save(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return _checked(path, network, image, run)


def write_safetensors(network: nn.Module, path: Path, metadata: str = "") -> None:
    """The network's weights by the names of its state_dict; `metadata`: text under "fastnas" in the file's head.

    Raises UserError when safetensors is not installed.
    """
    _extra("safetensors")
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, path, {KEY: metadata})


def read_safetensors(path: Path) -> nn.Module:
    """The network of a file that `export_network` wrote, in evaluation mode.

    Raises UserError when safetensors is not installed, and for a file that cannot be read or is of another origin.
    """
    from_file = _extra("safetensors").safe_open
    try:
        with from_file(str(path), "pt") as file:
            metadata = (file.metadata() or {}).get(KEY, "")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # its own class of errors differs from version to version
        raise UserError(f"cannot read {path} ({error}): give a file of python -m fastnas.export") from None
    if not metadata:
        raise UserError(f"{path} does not say which network it is of: give a file of python -m fastnas.export")
    network = NetworkCard.from_json(metadata).build()
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"the weights in {path} are not those of the network that it describes") from None
    return network.eval()


def export_network(
    run: str | Path, out: Path | None = None, formats: Sequence[str] = FORMATS
) -> dict[str, dict[str, Any]]:
    """Export the trained network of a run folder in some of FORMATS.

    Files go to `out`, by default the run folder: `network.onnx`, `network.pt2`, `network.safetensors`. Each
    format's `path` and, but for safetensors, `difference` are given back. The card of the network, with its genotype,
    is in the metadata of ONNX and safetensors and, as network.json, beside the files.
    """
    card, network = read_card(run), load_network(run)
    out = Path(run) if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    metadata = card.to_json()
    (out / "network.json").write_text(metadata, encoding="utf-8")
    results: dict[str, dict[str, Any]] = {}
    for name in formats:
        path = out / f"network{SUFFIXES[name]}"
        results[name] = {"path": path}
        if name == "onnx":
            results[name]["difference"] = export_onnx(network, card.image, path, metadata)
        elif name == "torch-export":
            results[name]["difference"] = export_torch(network, card.image, path)
        else:
            write_safetensors(network, path, metadata)
    return results


def _checked(path: Path, network: nn.Module, image: Sequence[int], other: Callable[[Tensor], Tensor]) -> float:
    """Largest difference of two forms of a network on random images; raises UserError above TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    with torch.no_grad():
        for batch in CHECKED_BATCHES:
            images = torch.randn(batch, *image, generator=generator)
            differences.append(float((other(images) - network(images)).abs().max()))
    largest = max(differences)
    if not largest <= TOLERANCE:  # NaN too
        path.unlink()
        raise UserError(
            f"the network in {path.name} differs from PyTorch's by {largest:.1e}, more than {TOLERANCE:.0e}, and was "
            "removed: check for layers whose evaluation is random or differs between the two"
        )
    return largest


def _extra(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{package} is needed for this format and is not installed: pip install fastnas[export]"
        ) from None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporters warn about their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.export",
        usage="%(prog)s RUN [--onnx] [--torch-export] [--safetensors] [--out FOLDER]",
        description="Write the trained network of a run of python -m fastnas.retrain for other programs. Without a "
        "flag that names a format, all of them.\n"
        "The network takes images as float32 [batch, channels, height, width], pixels scaled to 0..1, less the mean "
        "and over the standard deviation that network.json holds, and gives logits [batch, classes], any batch.",
        epilog="ONNX and torch.export are run once more from their files and compared with PyTorch on random images: "
        f"a difference above {TOLERANCE:.0e} is refused. In Python: fastnas.load_network(RUN).",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a retraining run")
    parser.add_argument(
        "--onnx", action="store_true", help="network.onnx, for ONNX Runtime, TensorRT, OpenVINO, browsers"
    )
    parser.add_argument(
        "--torch-export", action="store_true", help="network.pt2, for torch.export.load and C++, without fastnas"
    )
    parser.add_argument(
        "--safetensors", action="store_true", help="network.safetensors: the weights, with the genotype in its metadata"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the files go [the run folder]")
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    chosen = [name for name in FORMATS if getattr(arguments, name.replace("-", "_"))]
    card = read_card(arguments.run)
    counts = card.counts()
    size = "x".join(map(str, card.image))
    results = export_network(arguments.run, arguments.out, chosen or FORMATS)
    print(f"{'network':<13} {counts.parameters:,} parameters, {counts.multiply_adds:,} multiply-adds of a {size} image")
    for name, result in results.items():
        found = f"  largest difference from PyTorch {result['difference']:.1e}" if "difference" in result else ""
        print(f"{name:<13} {result['path']}{found}")


if __name__ == "__main__":
    sys.exit(run_command(main))
