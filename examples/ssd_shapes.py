"""A searched network as the backbone of torchvision's SSD, trained on drawn shapes (PC-DARTS, section 4.5).

    python examples/ssd_shapes.py                       # about a minute on a CPU; writes ssd_shapes.png
    python examples/ssd_shapes.py --network runs/mine   # from the trained network of a run of fastnas.retrain

Needs torchvision. The pictures are made here: one to three discs, squares and triangles on a noisy ground.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, nms
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

import fastnas
from fastnas.engine.networks import build_network
from fastnas.spaces import load_genotype

CLASSES = ("ground", "disc", "square", "triangle")
Target = dict[str, Tensor]


def draw_picture(size: int, generator: torch.Generator) -> tuple[Tensor, Target]:
    """A picture [3, size, size] in 0..1, and the boxes [N, 4] and labels [N] of the shapes in it."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    picture = 0.25 + 0.08 * torch.randn(3, size, size, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    boxes, labels = [], []
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        radius = uniform(0.12, 0.22) * size
        x, y = (uniform(radius, size - radius) for _ in range(2))
        box = torch.tensor([x - radius, y - radius, x + radius, y + radius])
        if boxes and float(box_iou(box[None], torch.stack(boxes)).max()) > 0.05:
            continue
        label = int(torch.randint(1, len(CLASSES), (), generator=generator))
        across, down = (columns - x) / radius, (rows - y) / radius
        inside = {
            "disc": across**2 + down**2 <= 1,
            "square": (across.abs() <= 1) & (down.abs() <= 1),
            "triangle": (down.abs() <= 1) & (across.abs() <= (1 + down) / 2),
        }[CLASSES[label]]
        colour = 0.35 + 0.65 * torch.rand(3, 1, generator=generator)
        picture[:, inside] = colour.expand(3, int(inside.sum()))
        boxes.append(box)
        labels.append(label)
    return picture.clamp(0, 1), {"boxes": torch.stack(boxes), "labels": torch.tensor(labels)}


def draw_pictures(count: int, size: int, seed: int) -> tuple[list[Tensor], list[Target]]:
    generator = torch.Generator().manual_seed(seed)
    pictures, targets = zip(*(draw_picture(size, generator) for _ in range(count)), strict=True)
    return list(pictures), list(targets)


def build_detector(network: nn.Module, size: int) -> SSD:
    """SSD on the three maps of the network and one of half the last one's size."""
    backbone = fastnas.Backbone(network, maps=3, extra=(64,))
    boxes = DefaultBoxGenerator([[2]] * 4, scales=[0.2, 0.3, 0.4, 0.6, 0.8])
    return SSD(backbone, boxes, (size, size), len(CLASSES), score_thresh=0.3, detections_per_img=10)


@torch.no_grad()
def detect(detector: SSD, pictures: Sequence[Tensor]) -> list[Target]:
    """Boxes, labels and scores of each picture; of boxes that overlap, whatever their labels, the best one stays."""
    results = detector.eval()(list(pictures))
    kept = [nms(result["boxes"], result["scores"], 0.3) for result in results]
    return [{key: value[rows] for key, value in result.items()} for result, rows in zip(results, kept, strict=True)]


def recall(detector: SSD, pictures: Sequence[Tensor], targets: Sequence[Target]) -> float:
    """Share of the shapes that a box of the right label covers with an IoU of at least one half."""
    found, total = 0, 0
    for result, target in zip(detect(detector, pictures), targets, strict=True):
        same = result["labels"][:, None] == target["labels"]
        covered = (box_iou(result["boxes"], target["boxes"]) >= 0.5) & same
        found, total = found + int(covered.any(0).sum()), total + len(target["labels"])
    return found / total


def save_picture(path: Path, detector: SSD, pictures: Sequence[Tensor]) -> None:
    """Eight pictures with the boxes and labels that the detector finds."""
    drawn = []
    for picture, result in zip(pictures, detect(detector, pictures), strict=True):
        picture = nn.functional.interpolate(picture[None], scale_factor=3)[0]
        pairs = zip(result["labels"], result["scores"], strict=True)
        names = [f"{CLASSES[label]} {score:.0%}" for label, score in pairs]
        drawn.append(draw_bounding_boxes(picture, 3 * result["boxes"], names, colors="white", width=2))
    save_image(make_grid(drawn, nrow=4, padding=6), path)


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Train and draw; gives the losses of all steps and the recall on pictures that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="PC_DARTS_image", help="genotype or run of fastnas.retrain [%(default)s]")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels [96]")
    parser.add_argument("--channels", type=int, default=16, help="of the network, when it is a genotype [16]")
    parser.add_argument("--cells", type=int, default=5, help="of the network, when it is a genotype [5]")
    parser.add_argument("--out", type=Path, default=Path("ssd_shapes.png"), help="picture with boxes [%(default)s]")
    parser.add_argument("--json", type=Path, help="also write the losses of all steps and the share that was found")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    if Path(given.network, "network.json").exists():
        network = fastnas.load_network(given.network)
    else:
        size = {"channels": given.channels, "cells": given.cells, "classes": 2}
        network = build_network(load_genotype(given.network), **size, stem="imagenet")
    detector = build_detector(network, given.size).train()
    optimizer = torch.optim.Adam(detector.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    losses = []
    for step in range(given.steps):
        pictures, targets = draw_pictures(given.batch, given.size, seed=step)
        parts = detector(pictures, targets)
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 40 == 0 or step == given.steps - 1:
            print(f"step {step + 1:4}  loss {losses[-1]:.3f}", flush=True)

    pictures, targets = draw_pictures(48, given.size, seed=10**6)
    share = recall(detector, pictures, targets)
    save_picture(given.out, detector, pictures[:8])
    if given.json:
        given.json.write_text(json.dumps({"losses": [round(loss, 4) for loss in losses], "found": share}) + "\n")
    print(f"found {share:.0%} of the shapes in new pictures; boxes drawn in {given.out}")
    return losses, share


if __name__ == "__main__":
    main()
