"""Search methods, one file each. `METHODS` maps the name of each to its class."""

from __future__ import annotations

from fastnas.methods.base import Method, Problem, WeightSettings
from fastnas.methods.darts import Darts
from fastnas.methods.one_shot import OneShot
from fastnas.methods.parsec import Parsec
from fastnas.methods.pc_darts import PCDarts
from fastnas.methods.proxyless import Proxyless
from fastnas.methods.random_search import RandomSearch
from fastnas.methods.snas import Snas
from fastnas.methods.spos import Spos
from fastnas.methods.vaenas import VaenasGradient, VaenasOneShot
from fastnas.spaces import CELL_SPACES, SPACES

_ALL: tuple[type[Method], ...] = (
    Darts,
    PCDarts,
    Parsec,
    Snas,
    Spos,
    Proxyless,
    VaenasOneShot,
    VaenasGradient,
    OneShot,
    RandomSearch,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}

_FURTHER_STRINGS = ("nasbench101", "shufflenet", "shufflenet_se")


def spaces_of(method: str) -> tuple[str, ...]:
    """Names of the spaces that a method searches, with those that have been registered."""
    if method == OneShot.name:
        return ("choice_blocks",)
    if method == RandomSearch.name:
        return tuple(SPACES)
    edges = (*CELL_SPACES, "nasbench201")  # each edge of a cell has one candidate
    return (*edges, *_FURTHER_STRINGS) if method in (Spos.name, VaenasOneShot.name) else edges


__all__ = [
    "METHODS",
    "Darts",
    "Method",
    "OneShot",
    "PCDarts",
    "Parsec",
    "Problem",
    "Proxyless",
    "RandomSearch",
    "Snas",
    "Spos",
    "VaenasGradient",
    "VaenasOneShot",
    "WeightSettings",
    "spaces_of",
]
