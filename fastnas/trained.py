"""A trained network from its run folder, in one call: `network = fastnas.load_network("runs/mine")`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastnas._files import replace_file
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.engine.networks import build_network
from fastnas.errors import UserError
from fastnas.profiler.counts import Counts, count
from fastnas.spaces import AnyGenotype
from fastnas.spaces.genotype import parse_genotype

FILE = "network.json"
CHECKPOINT_KIND = "retrain"


@dataclass(frozen=True)
class NetworkCard:
    """All that it takes to build a derived network again and to feed it; what exported files carry.

    Images are float32 [B, in_channels, image_size, image_size]: pixels scaled to 0..1, less `mean`, over `std`, per
    channel. Outputs are logits [B, classes].
    """

    genotype: AnyGenotype
    channels: int
    cells: int
    stem: str
    classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of one image, [C, H, W]."""
        return self.in_channels, self.image_size, self.image_size

    def build(self) -> nn.Module:
        """The network with fresh weights and without auxiliary head."""
        return build_network(
            self.genotype,
            channels=self.channels,
            cells=self.cells,
            classes=self.classes,
            in_channels=self.in_channels,
            stem=self.stem,
        )

    def counts(self) -> Counts:
        """Parameters and multiply-adds for one image; nothing is computed and no random number drawn."""
        with torch.device("meta"):
            return count(self.build(), self.image)

    def to_json(self) -> str:
        plain = {name: value for name, value in vars(self).items() if name != "genotype"}
        return json.dumps({**plain, "genotype": json.loads(self.genotype.to_json())}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> NetworkCard:
        """Raises UserError for text that is no card."""
        try:
            fields = json.loads(text)
            fields["genotype"] = parse_genotype(json.dumps(fields["genotype"]))
            return cls(**fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
        except UserError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"this is no description of a network ({type(error).__name__}: {error})") from None


def read_card(run: str | Path) -> NetworkCard:
    """The card of a retraining run. Raises UserError when the folder has none."""
    path = Path(run) / FILE
    try:
        return NetworkCard.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the folder of python -m fastnas.retrain, which trains "
            "the network that a search found"
        ) from None


def write_card(run: Path, card: NetworkCard) -> None:
    replace_file(run / FILE, [card.to_json().encode()])


def load_network(source: str | Path) -> nn.Module:
    """The trained network of a retraining run, or of a .safetensors file that `fastnas.export` wrote; on the CPU, in
    evaluation mode.

    A plain module of PyTorch's own layers without auxiliary head: images [B, C, H, W], normalised as `read_card` says,
    give logits [B, classes]. Of a run that is still going on it has the weights of the last epoch; where an average of
    the weights was kept (--ema), that. Raises UserError when there is no such run.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        from fastnas.export import read_safetensors

        return read_safetensors(path)
    card = read_card(path)
    state = load_checkpoint(path / "checkpoint.pt", method=CHECKPOINT_KIND)
    weights = state.get("ema") or state["network"]
    network = card.build()
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("auxiliary.")})
    return network.eval()
