"""Derivation rules: from architecture weights to a genotype. Each rule has a name that the genotype keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.darts import DartsSpace
from fastnas.spaces.genotype import Genotype, Node, live_edges
from fastnas.spaces.nasbench201 import Nasbench201Space

TOP2 = "top2"
TOP2_EDGE_NORMALISED = "top2-edge-normalised"
ALL_EDGES = "all-edges"
ARGMAX = "argmax"
SKIP = "skip_connect"


def derive_top2(
    space: DartsSpace,
    normal: Tensor,
    reduce: Tensor,
    normal_edges: Tensor | None = None,
    reduce_edges: Tensor | None = None,
    *,
    max_skips: int | None = None,
) -> Genotype:
    """The rule of DARTS (section 2.4) and, with edge weights, of PC-DARTS (section 3.3).

    `normal`, `reduce`: softmax of alpha over the candidates, [E, O]; `*_edges`: softmax of beta over the edges of
    each node, [E]. A node keeps the two edges with the largest max_o weight, `none` left out, and on each of them
    the candidate with the largest weight, `none` left out. Edge weights multiply the candidate weights first.
    Equal weights go to the earlier edge and the earlier candidate.

    `max_skips`: while the normal cell has more skip connections than that, the weight of the weakest of them is set to
    0 and the cell is derived again (as in P-DARTS, Chen et al. 2019, section 3.3).
    """

    def cell(weights: Tensor) -> tuple[Node, ...]:
        return tuple(_best_two(space, weights[space.edge_slice(node)].tolist()) for node in range(space.nodes))

    rule = TOP2 if normal_edges is None else TOP2_EDGE_NORMALISED
    weights = _edge_weighted(normal, normal_edges)
    nodes = cell(weights)
    if max_skips is not None:
        rule += f", at most {max_skips} skips"
        while count_skips(nodes) > max_skips and space.candidates_without_none != (SKIP,):
            kept = [
                space.edge_slice(node).start + source
                for node, pairs in enumerate(nodes)
                for name, source in pairs
                if name == SKIP
            ]
            skip = space.candidates.index(SKIP)
            weights[min(kept, key=lambda edge: float(weights[edge, skip])), skip] = 0.0
            nodes = cell(weights)
    return Genotype(nodes, cell(_edge_weighted(reduce, reduce_edges)), space.concat, space.concat, rule=rule)


def derive_nasbench201(space: Nasbench201Space, weights: Tensor, *, max_skips: int | None = None) -> ArchitectureString:
    """The best candidate of each edge, `none` among them; `weights`: softmax of alpha over the candidates, [6, 5].

    `max_skips`: while there are more skip connections, the weakest of them gives way to its edge's next candidate.
    """
    weights = _edge_weighted(weights, None)
    skip, rule = space.candidates.index(SKIP), ARGMAX
    best = weights.argmax(-1)
    if max_skips is not None:
        rule += f", at most {max_skips} skips"
        while int((best == skip).sum()) > max_skips:
            weakest = int(weights[:, skip].masked_fill(best != skip, torch.inf).argmin())
            weights[weakest, skip] = 0.0
            best = weights.argmax(-1)
    return space.decode(best.tolist(), rule=rule)


def count_skips(nodes: Sequence[Node]) -> int:
    """Skip connections of a cell: many of them in a normal cell are the sign of a collapsed search."""
    return sum(name == SKIP for node in nodes for name, _ in node)


def skips_and_edges(genotype: Genotype | ArchitectureString) -> dict[str, tuple[int, int]]:
    """For each cell that may collapse, its skip connections and all its edges but `none`; empty in other spaces."""
    if isinstance(genotype, Genotype):
        cells = {"normal": genotype.normal, "reduce": genotype.reduce}
        return {kind: (count_skips(nodes), sum(map(len, live_edges(nodes)))) for kind, nodes in cells.items()}
    if genotype.space != Nasbench201Space.name:
        return {}
    names = [Nasbench201Space.candidates[index] for index in genotype.string]
    return {"normal": (names.count(SKIP), len(names) - names.count("none"))}


def _edge_weighted(weights: Tensor, edges: Tensor | None) -> Tensor:
    weights = weights.detach().double().cpu().clone()
    return weights if edges is None else weights * edges.detach().double().cpu()[:, None]


def derive_all_edges(space: DartsSpace, normal: Tensor, reduce: Tensor) -> Genotype:
    """The rule of SNAS (section 3.1): on every edge the candidate with the largest weight, and that may be `none`.

    `normal`, `reduce`: [E, O]. Edges with `none` stay in the genotype and are not built.
    """

    best = [weights.detach().double().cpu().argmax(-1).tolist() for weights in (normal, reduce)]
    return space.free_edges(*best, rule=ALL_EDGES)


def _best_two(space: DartsSpace, weights: Sequence[Sequence[float]]) -> Node:
    allowed = [index for index, name in enumerate(space.candidates) if name != "none"]
    best = [max(allowed, key=lambda index, row=row: row[index]) for row in weights]
    ranked = sorted(range(len(weights)), key=lambda source: -weights[source][best[source]])
    return tuple((space.candidates[best[source]], source) for source in sorted(ranked[:2]))
