"""A search and a retraining as one call each, without the command line.

import fastnas

found = fastnas.search_network("runs/search", method="pc_darts", data="folder:flowers", image_size=32, epochs=30)
trained = fastnas.retrain_network(found.run.path, "runs/network", data="folder:flowers", image_size=32, epochs=100)
network = fastnas.load_network("runs/network")  # a torch.nn.Module
fastnas.export_network("runs/network")  # ONNX, torch.export, safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastnas import retrain, search
from fastnas.repeated_runs import started
from fastnas.retrain import RetrainResult
from fastnas.search import SearchResult


def search_network(out: str | Path, *, quiet: bool = True, **settings: Any) -> SearchResult:
    """Search an architecture, as `python -m fastnas.search` does; the run is kept in the folder `out`.

    `settings`: the command's, with underscores: `method`, `space`, `data`, `epochs`, ... and `preset`; without the
    latter, defaults are those of the preset that is named after method and data. Called again with the same folder and
    settings it goes on where it was stopped. Raises UserError for settings that are unknown, wrong, or not those of the
    run in `out`.
    """
    plan = search.resolve(settings)
    plan, resume = started(plan, Path(out), search.resolve)
    return search.run_search(plan, Path(out), resume=resume, quiet=quiet)


def retrain_network(genotype: str | Path, out: str | Path, *, quiet: bool = True, **settings: Any) -> RetrainResult:
    """Train the network of a genotype from scratch, as `python -m fastnas.retrain` does; the run is kept in `out`.

    `genotype`: the folder of a search, a file, or a published name; `settings` and what is raised as in
    `search_network`. The data set need not be that of the search.
    """
    plan = retrain.resolve({**settings, "genotype": str(genotype)})
    plan, resume = started(plan, Path(out), retrain.resolve)
    return retrain.run_retrain(plan, Path(out), resume=resume, quiet=quiet)
