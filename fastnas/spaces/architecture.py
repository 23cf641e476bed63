"""An architecture of a space that is not made of normal and reduction cells: one number a choice."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastnas.errors import UserError

MAX_PLACES = 1000


@dataclass(frozen=True)
class ArchitectureString:
    """The counterpart of `Genotype` in the spaces of choice blocks, chains and tables.

    `space`: name of the space; `string`: its choices, of which the space alone knows the meaning; `lines`: the same for
    people to read; `rule`: what chose it. Raises UserError for numbers that are no choices.
    """

    space: str
    string: tuple[int, ...]
    lines: tuple[str, ...] = ()
    rule: str = ""

    def __post_init__(self) -> None:
        numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in self.string)
        if not 1 <= len(self.string) <= MAX_PLACES or not numbers or min(self.string) < 0:
            raise UserError(f"genotype: the string must be up to {MAX_PLACES} numbers from 0, got {self.string!r:.60}")
        check_printable(self.space, self.rule, *self.lines)

    def to_json(self) -> str:
        """Versioned JSON that `fastnas.spaces.load_genotype` reads."""
        from fastnas.spaces.genotype import FORMAT, VERSION

        table = {"format": FORMAT, "version": VERSION, "space": self.space, "rule": self.rule}
        return json.dumps(table | {"string": self.string, "lines": self.lines}, indent=2, ensure_ascii=False) + "\n"

    def notation(self) -> str:
        """One line: what metrics keep."""
        return "; ".join(self.lines)

    def describe(self) -> str:
        """One line a choice."""
        return "\n".join(self.lines) + "\n"


def check_printable(*texts: str) -> None:
    """Raise UserError for texts that a terminal or a file could not take: controls, surrogates."""
    for text in texts:
        if not text.isprintable():
            raise UserError(f"genotype: {ascii(text):.60} has characters that cannot be printed")
