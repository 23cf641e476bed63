"""Evolution over architecture strings under limits on size (Guo et al. 2020, "Single Path One-Shot", Algorithm 1).

A population is scored with shared weights, the best `parents` of all so far are kept, and the next population is made
of crossovers and mutations of these, filled up at random. No architecture is scored twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastnas.config import option
from fastnas.engine.cost import NetworkCost
from fastnas.engine.networks import build_network
from fastnas.errors import UserError
from fastnas.methods.base import Problem
from fastnas.profiler.counts import Counts, count
from fastnas.spaces import AnyGenotype, ArchitectureString, DartsSpace
from fastnas.spaces.strings import String, Strings

TRIES = 10  # times the number wanted: draws before crossovers and mutations give way to random strings (released code)
RANDOM_TRIES = 1000  # draws before a limit counts as out of reach


@dataclass(frozen=True)
class LimitSettings:
    """Hard limits on what may be found. They hold for the network that will be retrained."""

    max_parameters: float | None = option(None, "most parameters of the derived network; none is no limit", above=0)
    max_multiply_adds: float | None = option(None, "most multiply-adds of it for one image; none is no limit", above=0)
    target_channels: int = option(36, "channels of the derived network that the limits are for", minimum=2)
    target_cells: int = option(20, "cells of that network", minimum=3)


@dataclass(frozen=True)
class EvolutionSettings(LimitSettings):
    """The defaults are those of Single Path One-Shot (section 4)."""

    generations: int = option(20, "populations that are scored", minimum=1)
    population: int = option(50, "architectures of a population", minimum=2)
    parents: int = option(10, "best architectures so far, from which the next population is made", minimum=1)
    crossovers: int = option(25, "architectures of a population that cross two parents", minimum=0)
    mutations: int = option(25, "architectures of a population that mutate one parent", minimum=0)
    mutation_rate: float = option(
        0.1, "probability that a mutation draws a place of the string anew", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        if self.crossovers + self.mutations > self.population:
            raise UserError(
                f"crossovers and mutations fill at most the population of {self.population}, "
                f"got {self.crossovers} + {self.mutations}"
            )


class Limits:
    """Whether a genotype fits: its parameters and multiply-adds in a network of the target's size.

    In DARTS-like cells both are counted from cost tables that give an upper bound for genotypes that drop whole nodes,
    and the exact number for all others: whatever passes stays within the limits when it is built.
    """

    def __init__(self, settings: LimitSettings, problem: Problem) -> None:
        self.parameters, self.multiply_adds = settings.max_parameters, settings.max_multiply_adds
        self.unlimited = self.parameters is None and self.multiply_adds is None
        self.settings, self.problem = settings, problem
        if not self.unlimited and isinstance(problem.space, DartsSpace):
            self.costs = NetworkCost(
                problem.space,
                channels=settings.target_channels,
                cells=settings.target_cells,
                image_size=problem.image_size,
                classes=problem.classes,
                in_channels=problem.in_channels,
                stem=problem.weights.stem,
            )

    def allow(self, genotype: AnyGenotype) -> bool:
        if self.unlimited:
            return True
        cost = self._count(genotype) if isinstance(genotype, ArchitectureString) else self.costs.of(genotype)
        return (self.parameters is None or cost.parameters <= self.parameters) and (
            self.multiply_adds is None or cost.multiply_adds <= self.multiply_adds
        )

    def _count(self, genotype: ArchitectureString) -> Counts:
        """By building the network without memory: exact, in milliseconds."""
        settings, problem = self.settings, self.problem
        with torch.device("meta"):
            network = build_network(
                genotype,
                channels=settings.target_channels,
                cells=settings.target_cells,
                classes=problem.classes,
                in_channels=problem.in_channels,
                stem=problem.weights.stem,
            )
        return count(network, (problem.in_channels, problem.image_size, problem.image_size))


def evolve(
    strings: Strings,
    score: Callable[[String], float],
    allow: Callable[[String], bool],
    settings: EvolutionSettings,
    rng: random.Random,
    *,
    seeds: Iterable[String] = (),
) -> list[tuple[String, float]]:
    """The best `parents` strings with their scores, best first; `seeds` go into the first population.

    Raises UserError when no string that `allow` lets through is found by chance.
    """
    scores: dict[String, float] = {}

    def add(wanted: int, draw: Callable[[], String], tries: int, population: list[String]) -> None:
        """Up to `wanted` new strings that `draw` gives."""
        start = len(population)
        for _ in range(tries):
            if len(population) - start >= wanted:
                return
            string = draw()
            if string not in scores and string not in population and allow(string):
                population.append(string)

    population: list[String] = []
    for string in seeds:
        add(1, lambda string=string: string, 1, population)
    population = population[: settings.population]
    top: list[tuple[String, float]] = []
    for _ in range(settings.generations):
        rest = settings.population - len(population)
        add(rest, lambda: strings.random_string(rng), RANDOM_TRIES * (1 if top else rest), population)
        if not population and not top:
            raise UserError(
                f"{RANDOM_TRIES * rest} random architectures were all too large: raise --max-parameters or "
                "--max-multiply-adds, or lower --target-channels or --target-cells"
            )
        for string in population:
            scores[string] = score(string)
        top = sorted(scores.items(), key=lambda item: -item[1])[: settings.parents]
        best = [string for string, _ in top]
        population = []
        add(
            settings.crossovers,
            lambda best=best: strings.cross(rng.choice(best), rng.choice(best), rng),
            TRIES * settings.crossovers,
            population,
        )
        add(
            settings.mutations,
            lambda best=best: strings.mutate(rng.choice(best), settings.mutation_rate, rng),
            TRIES * settings.mutations,
            population,
        )
    return top
