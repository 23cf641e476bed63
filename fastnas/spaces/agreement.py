"""How far several genotypes of one space agree, edge by edge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastnas.spaces import AnyGenotype
from fastnas.spaces.genotype import Genotype, Node


def edge_agreement(genotypes: Sequence[AnyGenotype]) -> dict[str, float]:
    """For each edge that at least one genotype has, the share of the genotypes with the most frequent choice there.

    A choice is the candidates of the edge, or that it is absent; in the spaces of strings an edge is a place. 1 is full
    agreement, and 1 / len(genotypes) is none. Keys name the edge, such as ``normal 0 -> node 1``.
    """
    tables = [_choices(genotype) for genotype in genotypes]
    edges = {edge: None for table in tables for edge in table}
    agreement = {}
    for edge in edges:
        counts = Counter(table.get(edge, ()) for table in tables)
        agreement[edge] = max(counts.values()) / len(tables)
    return agreement


def _choices(genotype: AnyGenotype) -> dict[str, tuple]:
    if not isinstance(genotype, Genotype):
        return {f"place {place}": (number,) for place, number in enumerate(genotype.string)}
    return _cell("normal", genotype.normal) | _cell("reduce", genotype.reduce)


def _cell(kind: str, nodes: Sequence[Node]) -> dict[str, tuple]:
    found: dict[str, list[str]] = {}
    for target, node in enumerate(nodes):
        for name, source in node:
            if name != "none":
                found.setdefault(f"{kind} {source} -> node {target}", []).append(name)
    return {edge: tuple(sorted(names)) for edge, names in found.items()}
