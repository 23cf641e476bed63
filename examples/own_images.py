"""From a folder of images to ONNX: search, retrain, export, and one picture through ONNX Runtime.

    python examples/own_images.py                            # draws a small data set; half a minute on one core
    python examples/own_images.py --images ~/flowers --image-size 64 --search-epochs 30 --epochs 200

Images lie in one folder a class: flowers/rose/*.jpg, flowers/tulip/*.jpg. Needs `pip install fastnas[export]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import fastnas


def draw_images(folder: Path, size: int, count: int = 80) -> None:
    """Three classes of `count` noisy pictures: stripes across, stripes down, chequers."""
    rows, columns = np.mgrid[:size, :size]
    random = np.random.default_rng(0)
    for number in range(3 * count):
        period, shift = random.integers(3, 6), random.integers(0, 6, 2)
        across, down = (rows + shift[0]) // period % 2, (columns + shift[1]) // period % 2
        name, pattern = [("across", across), ("down", down), ("chequers", across ^ down)][number % 3]
        colours = random.integers(60, 200, (2, 3))
        picture = np.where(pattern[..., None], colours[0], colours[1]) + random.normal(0, 15, (size, size, 3))
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)


def classify(onnx_file: Path, picture: Path) -> int:
    """The class of a picture, as any program without fastnas would find it."""
    import onnxruntime

    card = json.loads(onnx_file.with_name("network.json").read_text())
    side = card["image_size"]
    pixels = np.asarray(Image.open(picture).convert("RGB").resize((side, side)), dtype=np.float32) / 255
    normalised = (pixels - np.float32(card["mean"])) / np.float32(card["std"])
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": normalised.transpose(2, 0, 1)[None]})
    return int(logits.argmax())


def main(arguments: Sequence[str] | None = None) -> float:
    """Run all of it; gives the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder with one folder of images a class [draw some]")
    parser.add_argument("--image-size", type=int, default=16, help="side in pixels that images are resized to [16]")
    parser.add_argument("--search-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=40, help="of the final training [40]")
    parser.add_argument("--out", type=Path, default=Path("runs/own_images"))
    given = parser.parse_args(arguments)
    images = given.images or given.out / "images"
    if given.images is None:
        draw_images(images, given.image_size)

    data = {"data": f"folder:{images}", "image_size": given.image_size, "batch_size": 16}
    network = {"channels": 8, "cells": 3}
    found = fastnas.search_network(
        given.out / "search", method="pc_darts", epochs=given.search_epochs, nodes=2, warmup_epochs=1, **network, **data
    )
    print("found      ", found.genotype.notation())
    trained = fastnas.retrain_network(
        found.run.path,
        given.out / "network",
        epochs=given.epochs,
        auxiliary_weight=0.0,
        drop_path=0.0,
        **network,
        **data,
    )
    print(f"trained     {trained.test_accuracy:.1%} of the test images, {trained.parameters:,} parameters")
    exported = fastnas.export_network(trained.run.path, formats=["onnx"])["onnx"]
    print(f"exported    {exported['path']}, largest difference {exported['difference']:.1e}")

    classes = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    picture = next(path for path in sorted((images / classes[0]).iterdir()))
    print(f"classified  {picture} as {classes[classify(exported['path'], picture)]}")
    return trained.test_accuracy


if __name__ == "__main__":
    main()
