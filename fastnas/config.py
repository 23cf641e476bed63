"""Settings: frozen dataclasses, then a TOML preset, then flags.

A run is described by a few dataclasses, for example one that all searches share and one of the chosen method.
Their fields live in one flat namespace::

    @dataclass(frozen=True)
    class SearchSettings:
        batch_size: int = option(64, "images a step", minimum=1)

    add_flags(parser, SearchSettings, *settings_of_methods.values())
    flags = given(parser.parse_args(), SearchSettings, *settings_of_methods.values())
    search, darts = merge((SearchSettings, DartsSettings), read_preset("darts-cifar10"), flags)

Field types: int, float, bool, str, Path, ``tuple[X, ...]`` of these, and ``X | None``. TOML has no null: a
field that may be None takes the text ``"none"`` for it, in files and on the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastnas.errors import UserError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECORDS = ("versions", "hashes")  # tables of a run's config.toml that record, and set nothing
WHICH_DATA = ("data", "data_dir", "image_size")  # settings that the next command on the same data has to repeat
MAX_INTEGER = 2**63 - 1
MAX_TEXT = 1 << 18  # characters of a settings file; a run's config.toml has about 2,000
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help line and the values that it may take.

    ``minimum`` and ``maximum`` are inclusive, ``above`` is not; all bind every element of a tuple.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A field of a settings dataclass: a ``kind``, or a tuple of these if many, or None too if optional."""

    flag: str
    default: Any
    limits: Mapping[str, Any]
    kind: type
    many: bool
    optional: bool

    def parse(self, text: str) -> Any:
        """What ``text`` on a command line stands for. The unreadable stays text, for `check` to name."""
        if self.optional and text.lower() == "none":
            return None
        parts = [self._parse_one(part.strip()) for part in text.split(",")] if self.many and text else []
        return parts if self.many else self._parse_one(text)

    def _parse_one(self, text: str) -> Any:
        try:
            return self.kind(text) if self.kind in (int, float) else text
        except ValueError:
            return text

    def check(self, value: Any) -> Any:
        """``value`` in the field's type; raises UserError when its type or range is wrong."""
        if self.optional and (value is None or value == "none"):
            return None
        if not self.many:
            return self._check_one(value)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self.flag} must be a list, got {_shown(value)}")
        return tuple(self._check_one(element) for element in value)

    def _check_one(self, value: Any) -> Any:
        if type(value) is int and abs(value) > MAX_INTEGER:
            raise UserError(f"{self.flag} must be at most {MAX_INTEGER}, got {_shown(value)}")
        if self.kind is float and type(value) is int:
            value = float(value)
        elif self.kind is Path and isinstance(value, str):
            try:
                value = Path(value).expanduser()
            except RuntimeError:
                raise UserError(f"{self.flag}: {value!r} names the home of a user who is not known here") from None
        choices, minimum = self.limits.get("choices"), self.limits.get("minimum")
        maximum, above = self.limits.get("maximum"), self.limits.get("above")
        wanted = ""
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            wanted = _KINDS[self.kind] + (" or 'none'" if self.optional else "")
        elif choices is not None and value not in choices:
            wanted = f"one of {', '.join(map(str, choices))}"
        elif self.kind is float and math.isnan(value):
            wanted = "a number"
        elif minimum is not None and value < minimum:
            wanted = f"at least {minimum}"
        elif maximum is not None and value > maximum:
            wanted = f"at most {maximum}"
        elif above is not None and value <= above:
            wanted = f"above {above}"
        if wanted:
            hint = did_you_mean(value, map(str, choices or ())) if isinstance(value, str) else ""
            in_list = "each of " if self.many else ""
            raise UserError(f"{in_list}{self.flag} must be {wanted}, got {_shown(value)}{hint}")
        return value


def _shown(value: Any) -> str:
    """A value in a message; Python writes no numbers of more than 4,300 digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _settings(cls: type) -> dict[str, _Setting]:
    """The fields of a settings dataclass; TypeError for a type that neither TOML nor a flag can give."""
    annotations = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind = annotations[field.name]
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        optional = typing.get_origin(kind) in (types.UnionType, typing.Union) and len(members) == 1
        kind = members[0] if optional else kind
        many = typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (Ellipsis,)
        kind = typing.get_args(kind)[0] if many else kind
        if kind not in _KINDS:
            raise TypeError(f"{cls.__name__}.{field.name}: no setting can have the type {kind}")
        flag = field.name.replace("_", "-")
        found[field.name] = _Setting(flag, field.default, field.metadata, kind, many, optional)
    return found


def add_flags(parser: argparse._ActionsContainer, *classes: type) -> None:
    """One ``--kebab-case`` flag a field, ``--x/--no-x`` for a bool; classes that share a name share its flag.

    A flag that is not given leaves no trace in the namespace, so that only given ones override: see `given`.
    """
    shared: dict[str, list[_Setting]] = {}
    for cls in classes:
        for name, setting in _settings(cls).items():
            shared.setdefault(name, []).append(setting)
    for name, owners in shared.items():
        first = owners[0]
        if any((s.kind, s.many, s.optional) != (first.kind, first.many, first.optional) for s in owners):
            raise TypeError(f"the settings classes differ in the type of {name}")
        default = " or ".join(dict.fromkeys(_default_text(owner) for owner in owners))
        help_text = f"{first.limits.get('help', '')} [{default}]".replace("%", "%%")
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if first.kind is not bool:
            choices = first.limits.get("choices")
            metavar = "{" + ",".join(map(str, choices)) + "}" if choices else first.kind.__name__.upper()
            form = {"type": first.parse, "metavar": metavar}
        parser.add_argument(f"--{first.flag}", dest=name, default=argparse.SUPPRESS, help=help_text, **form)


def _default_text(setting: _Setting) -> str:
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    if isinstance(setting.default, tuple):
        return ",".join(map(str, setting.default))
    return "none" if setting.default is None else str(setting.default)


def as_flags(settings: Mapping[str, Any], *names: str) -> str:
    """Those of ``names`` that are set, as a command line takes them: ``"--data digits --image-size 16"``."""
    values = [(name, settings.get(name)) for name in names]
    return " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in values if value not in (None, "none")
    )


def given(namespace: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """The settings that the command line gave: the top layer for `merge`."""
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(namespace).items() if name in names}


class Layer(dict[str, Any]):
    """Settings read from ``source``, which errors name."""

    source = ""


def read_toml(path: str | Path) -> Layer:
    """The settings of a flat TOML file; the tables of a run's config.toml that are none (`RECORDS`) are left out."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the settings file {path}: {reason}") from error
    if len(text) > MAX_TEXT:
        raise UserError(f"{path} is longer than {MAX_TEXT} characters, so it is no settings file")
    return _parse_toml(text, str(path))


def _parse_toml(text: str, source: str) -> Layer:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and numbers of thousands of digits
        raise UserError(f"{source} is not valid TOML: {error}") from error
    for name in RECORDS:
        table.pop(name, None)
    for key, value in table.items():
        if isinstance(value, dict):
            raise UserError(f"{source}: [{key}] is a table; settings are flat: write its keys without it")
    layer = Layer({key.replace("-", "_"): value for key, value in table.items()})
    layer.source = source
    return layer


def preset_names() -> list[str]:
    """The presets that fastnas brings."""
    folder = resources.files("fastnas") / "presets"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_preset(name: str) -> Layer:
    """The settings of a preset, by its name, or of any settings file, by its ``.toml`` path."""
    if name.endswith(".toml"):
        return read_toml(name)
    known = preset_names()
    if name not in known:
        hint = did_you_mean(name, known) or ";"
        listed = ", ".join(known)
        raise UserError(f"unknown preset {name!r}{hint} give the path of a .toml file or one of: {listed}")
    text = (resources.files("fastnas") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return _parse_toml(text, f"preset {name}")


def merge(
    classes: Sequence[type], *layers: Mapping[str, Any], others: Mapping[str, type] | None = None
) -> tuple[Any, ...]:
    """One instance of each class, from its defaults and then the layers, later ones over earlier ones.

    Raises UserError for a wrong type or range and for an unknown setting, with the nearest name. ``others``,
    the settings classes of the methods by their names, lets it say whose setting an unknown one is.
    """
    settings = [_settings(cls) for cls in classes]
    known = {name for fields in settings for name in fields}
    values: list[dict[str, Any]] = [{} for _ in classes]
    for layer in layers:
        where = f"{layer.source}: " if isinstance(layer, Layer) else ""
        for key, value in layer.items():
            owners = [index for index, fields in enumerate(settings) if key in fields]
            if not owners:
                raise UserError(where + _unknown(key, known, others or {}))
            for index in owners:
                try:
                    values[index][key] = settings[index][key].check(value)
                except UserError as error:
                    raise UserError(f"{where}{error}") from None
    return tuple(cls(**chosen) for cls, chosen in zip(classes, values, strict=True))


def _unknown(key: str, known: set[str], others: Mapping[str, type]) -> str:
    owners = [name for name, cls in others.items() if any(f.name == key for f in dataclasses.fields(cls))]
    if owners:
        return f"{key.replace('_', '-')} is a setting of {' and '.join(owners)}, not of the chosen method"
    return f"unknown setting {key!r}{did_you_mean(key, known) or '; --help lists all settings'}"


def dump_toml(mapping: Mapping[str, Any]) -> str:
    """TOML text of a flat mapping; values that are mappings themselves become tables at its end."""
    tables = {key: value for key, value in mapping.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in mapping.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]"] + [f"{_key(key)} = {_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if value is None or isinstance(value, (str, Path)):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        text = "none" if value is None else str(value)
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"TOML has no form for {value!r}")
