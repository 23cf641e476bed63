"""A genotype: the discrete architecture that a search ends with, as frozen data.

Two notations are read and written: versioned JSON, and the tuple notation of the DARTS papers and repositories
(`Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), ...)`). Both are parsed, never evaluated.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastnas.errors import UserError
from fastnas.nn.candidates import candidate_names
from fastnas.spaces.architecture import ArchitectureString, check_printable

FORMAT = "fastnas-genotype"
VERSION = 1
MAX_TEXT = 1 << 18  # characters; a genotype of 7 nodes takes about 2,000
MAX_NODES = 64

Node = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Genotype:
    """The normal and the reduction cell of a network.

    `normal`, `reduce`: for each node its (candidate name, input state) pairs. States 0 and 1 are the outputs of the
    cell before the previous one and of the previous cell; state 2+i is node i. `*_concat`: the states whose
    concatenation is the cell's output. `rule`: the derivation rule that chose it (fastnas.spaces.derive). An edge
    with the candidate `none` is dropped: see `live_edges`.

    Raises UserError for an unknown candidate, an input that is not an earlier state, or an empty cell.
    """

    normal: tuple[Node, ...]
    reduce: tuple[Node, ...]
    normal_concat: tuple[int, ...]
    reduce_concat: tuple[int, ...]
    space: str = "darts"
    rule: str = ""

    def __post_init__(self) -> None:
        check_printable(self.space, self.rule)
        known = candidate_names()
        for kind, nodes, concat in (
            ("normal", self.normal, self.normal_concat),
            ("reduce", self.reduce, self.reduce_concat),
        ):
            if not 1 <= len(nodes) <= MAX_NODES:
                raise UserError(f"genotype: the {kind} cell has {len(nodes)} nodes; 1 to {MAX_NODES} are possible")
            for index, node in enumerate(nodes):
                for name, source in node:
                    if name not in known:
                        raise UserError(
                            f"genotype: node {index} of the {kind} cell uses the unknown candidate {name!r}; "
                            f"registered are {', '.join(known)}"
                        )
                    if not 0 <= source < 2 + index:
                        raise UserError(
                            f"genotype: node {index} of the {kind} cell reads state {source}; "
                            f"it can read states 0 to {1 + index}"
                        )
            if not concat or any(not 0 <= state < 2 + len(nodes) for state in concat):
                raise UserError(
                    f"genotype: {kind}_concat is {list(concat)}; it must list states from 0 to {1 + len(nodes)}"
                )

    def to_json(self) -> str:
        """Versioned JSON, one node a line."""

        def cell(nodes: tuple[Node, ...]) -> str:
            return "[\n    " + ",\n    ".join(json.dumps(node) for node in nodes) + "\n  ]"

        head = {"format": FORMAT, "version": VERSION, "space": self.space, "rule": self.rule}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        lines += [f'"normal": {cell(self.normal)}', f'"normal_concat": {json.dumps(self.normal_concat)}']
        lines += [f'"reduce": {cell(self.reduce)}', f'"reduce_concat": {json.dumps(self.reduce_concat)}']
        return "{\n  " + ",\n  ".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Parse the JSON form. Raises UserError with the reason when it is not a valid genotype."""
        try:
            data = json.loads(_bounded(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"genotype: not valid JSON ({_first_line(error)})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(
                f'genotype: the JSON lacks "format": "{FORMAT}", so it is not a fastnas genotype; '
                "give the genotype.json of a run"
            )
        if data.get("version") != VERSION:
            raise UserError(
                f"genotype: version {data.get('version')!r} was written by another fastnas; this one reads {VERSION}"
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        _check_keys(fields)
        for cell in ("normal", "reduce"):
            fields[cell] = tuple(_pairs(node, cell) for node in _sequence(fields[cell], cell))
            fields[f"{cell}_concat"] = _states(fields[f"{cell}_concat"], f"{cell}_concat")
        for key in ("space", "rule"):
            if not isinstance(fields.get(key, ""), str):
                raise UserError(f"genotype: {key} must be text, got {fields[key]!r}")
        return cls(**fields)

    def notation(self) -> str:
        """One line: what metrics keep."""
        return self.to_darts()

    def to_darts(self) -> str:
        """The tuple notation of the DARTS repositories."""

        def cell(nodes: tuple[Node, ...]) -> list[tuple[str, int]]:
            return [pair for node in nodes for pair in node]

        return (
            f"Genotype(normal={cell(self.normal)}, normal_concat={list(self.normal_concat)}, "
            f"reduce={cell(self.reduce)}, reduce_concat={list(self.reduce_concat)})"
        )

    @classmethod
    def from_darts(cls, text: str, *, rule: str = "imported") -> Genotype:
        """Parse the tuple notation: two pairs a node, or all edges of every node (SNAS). Nothing is evaluated."""
        try:
            call = ast.parse(_bounded(text).strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"genotype: cannot parse the tuple notation ({_first_line(error)})") from None
        if not isinstance(call, ast.Call) or call.args:
            raise UserError(
                "genotype: expected Genotype(normal=[...], normal_concat=[...], reduce=[...], reduce_concat=[...])"
            )
        numbers = (node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
        if any(isinstance(number, int) and number > MAX_TEXT for number in numbers):
            raise UserError(f"genotype: a number is larger than {MAX_TEXT}, so it is no state")
        fields = {keyword.arg or "**": _literal(keyword.value) for keyword in call.keywords}
        _check_keys(fields)
        for cell in ("normal", "reduce"):
            fields[f"{cell}_concat"] = _states(fields[f"{cell}_concat"], f"{cell}_concat")
            fields[cell] = _group_by_node(_pairs(fields[cell], cell), fields[f"{cell}_concat"], cell)
        return cls(**fields, rule=rule)


def live_edges(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The edges of a cell that carry something: neither `none` themselves, nor from a node that none reaches."""
    live: list[Node] = []
    for node in nodes:
        live.append(tuple(pair for pair in node if pair[0] != "none" and (pair[1] < 2 or live[pair[1] - 2])))
    return tuple(live)


def load_genotype(source: str | Path) -> Genotype | ArchitectureString:
    """Read a genotype by published name (`DARTS_V2`), from a JSON or tuple-notation file, or from a run folder.

    Raises UserError when there is no such name or file, or when its content is not a genotype.
    """
    from fastnas.spaces.published import PUBLISHED

    if str(source) in PUBLISHED:
        return PUBLISHED[str(source)]
    path = Path(source)
    if path.is_dir():
        path = path / "genotype.json"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except FileNotFoundError:
        raise UserError(
            f"genotype {str(source)!r}: no such file, and no published genotype has that name ({', '.join(PUBLISHED)})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"genotype {path}: cannot be read ({_first_line(error)})") from None
    try:
        return parse_genotype(text) if text.lstrip().startswith("{") else Genotype.from_darts(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_genotype(text: str) -> Genotype | ArchitectureString:
    """The genotype of either kind that is written as JSON. Raises UserError when it is none."""
    try:
        data = json.loads(_bounded(text))
    except (ValueError, RecursionError):
        data = None
    match data:
        case {"format": "fastnas-genotype", "version": 1, "space": str(space), "string": [*string]}:
            lines, rule = data.get("lines", []), data.get("rule", "")
            if isinstance(lines, list) and all(isinstance(line, str) for line in lines) and isinstance(rule, str):
                return ArchitectureString(space, tuple(string), tuple(lines), rule)
    return Genotype.from_json(text)


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise UserError(f"genotype: the text is longer than {MAX_TEXT} characters, so it is no genotype")
    return text


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_keys(fields: dict[str, object]) -> None:
    required = {"normal", "reduce", "normal_concat", "reduce_concat"}
    missing = sorted(required - set(fields))
    extra = sorted(set(fields) - required - {"space", "rule"})
    if missing or extra:
        problem = f"{missing[0]} is missing" if missing else f"{extra[0]!r} is not a part of a genotype"
        raise UserError(f"genotype: {problem}")


def _sequence(value: object, name: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise UserError(f"genotype: {name} must be a list, got {value!r:.60}")
    return list(value)


def _pairs(value: object, name: str) -> Node:
    pairs = []
    for pair in _sequence(value, name):
        match pair:
            case (str(op), int(state)) | [str(op), int(state)] if not isinstance(state, bool):
                pairs.append((op, state))
            case _:
                raise UserError(f"genotype: {name} must hold (candidate, state) pairs, got {pair!r:.60}")
    return tuple(pairs)


def _states(value: object, name: str) -> tuple[int, ...]:
    states = _sequence(value, name)
    if not all(isinstance(state, int) and not isinstance(state, bool) for state in states):
        raise UserError(f"genotype: {name} must hold state numbers, got {value!r:.60}")
    return tuple(states)  # type: ignore[arg-type]


def _literal(node: ast.expr) -> object:
    """A literal, or range(a, b) with small integer bounds as the released genotypes write it."""
    match node:
        case ast.Call(func=ast.Name(id="range"), args=[*bounds], keywords=[]) if 1 <= len(bounds) <= 2:
            values = [_literal(bound) for bound in bounds]
            if all(isinstance(value, int) and 0 <= value <= MAX_NODES + 2 for value in values):
                return list(range(*values))  # type: ignore[arg-type]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise UserError("genotype: only names, numbers and lists may appear in the tuple notation") from None


def _group_by_node(pairs: Node, concat: tuple[int, ...], name: str) -> tuple[Node, ...]:
    """Split the flat list: two pairs a node, or 2, 3, 4, ... pairs when every edge is listed (SNAS)."""
    nodes = max(concat, default=1) - 1
    starts = [sum(2 + earlier for earlier in range(node)) for node in range(min(nodes, MAX_NODES) + 1)]
    if nodes > 1 and len(pairs) == starts[-1]:
        return tuple(pairs[start:stop] for start, stop in zip(starts, starts[1:], strict=False))
    if not pairs or len(pairs) % 2:
        raise UserError(f"genotype: {name} has {len(pairs)} pairs; it needs two a node, or all edges of every node")
    return tuple(pairs[index : index + 2] for index in range(0, len(pairs), 2))
