"""Search methods, one file each. `METHODS` maps the name of each to its class."""

from __future__ import annotations

from fastnas.methods.base import Method, Problem, WeightSettings
from fastnas.methods.darts import Darts
from fastnas.methods.parsec import Parsec
from fastnas.methods.pc_darts import PCDarts
from fastnas.methods.random_search import RandomSearch
from fastnas.methods.snas import Snas
from fastnas.methods.spos import Spos

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Darts, PCDarts, Parsec, Snas, Spos, RandomSearch)
}

__all__ = [
    "METHODS",
    "Darts",
    "Method",
    "PCDarts",
    "Parsec",
    "Problem",
    "RandomSearch",
    "Snas",
    "Spos",
    "WeightSettings",
]
