"""Checkpoints that survive a kill at any moment and never run code when they are read.

A file is one header line, ``fastnas-checkpoint <format> <sha256 of the rest>``, one line of JSON naming the
method that wrote it, and the state as `torch.save` writes it. ``checkpoint.prev.pt`` beside ``checkpoint.pt``
is the one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastnas import processes
from fastnas._files import replace_file
from fastnas.errors import UserError

FORMAT = 1
_HEADER = re.compile(rb"fastnas-checkpoint (\d{1,9}) ([0-9a-f]{64})\n")
# What the pickles of plain values and tensors name, and the other opcodes that make objects.
_GLOBALS = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")
_OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_PLAIN = (int, float, bool, str, bytes, type(None), torch.Tensor, torch.nn.Parameter)


@contextlib.contextmanager
def fits_settings_of(run: Path) -> Iterator[None]:
    """Within the block the state of a checkpoint of the folder ``run`` is loaded: UserError when it does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint of {run} does not fit the settings in its config.toml: "
            "put back the settings that it was made with, or start a new run"
        ) from error


class _Unreadable(Exception):
    """Why a file is no complete checkpoint."""


def save_checkpoint(path: str | Path, state: dict[str, Any], *, method: str) -> None:
    """Write ``state`` to ``path`` atomically; the checkpoint that was there stays as ``<stem>.prev<suffix>``.

    Of several processes that work as one only the first writes.
    ``state`` may hold tensors, numbers, strings, None, lists, tuples and dicts: what can be read back without
    running code. Anything else raises TypeError naming its place. Raises OSError when the file cannot be
    written; the earlier checkpoints are then as they were.
    """
    if not processes.is_main():
        return
    path = Path(path)
    _check_plain(state, "state")
    buffer = io.BytesIO()
    buffer.write(json.dumps({"method": method}).encode() + b"\n")
    torch.save(state, buffer)
    body = buffer.getbuffer()
    header = f"fastnas-checkpoint {FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode()
    # A damaged file must not take the place of the good one before it.
    keep = _previous(path) if _is_good(path) else None
    replace_file(path, (header, body), keep=keep)


def load_checkpoint(path: str | Path, *, method: str) -> dict[str, Any]:
    """The state of the newest good checkpoint at ``path``, its tensors on the CPU.

    Instead of a damaged or missing file the one before it is read, with a warning. Raises UserError when
    neither is good, or when it was written by another method or in another format.
    """
    path = Path(path)
    candidates = [candidate for candidate in (path, _previous(path)) if candidate.exists()]
    if not candidates:
        raise UserError(f"no checkpoint at {path}: give a run folder that has one, or start a new run")
    problems = []
    for candidate in candidates:
        try:
            format_version, body = _read(candidate)
            if format_version != FORMAT:
                raise UserError(
                    f"the checkpoint {candidate} has format {format_version}, this fastnas reads {FORMAT}: "
                    "resume with the fastnas that wrote it (see [versions] in the run's config.toml)"
                )
            state = _load(body, candidate, method)
        except _Unreadable as problem:
            problems.append(f"{candidate.name} {problem}")
            continue
        if candidate != path:
            reason = "; ".join(problems) or f"{path.name} is missing"
            warnings.warn(f"{reason}: going on from the checkpoint before it, {candidate}", stacklevel=2)
        return state
    raise UserError(f"no good checkpoint in {path.parent}: {'; '.join(problems)}. Start a new run")


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _is_good(path: Path) -> bool:
    try:
        _read(path)
    except _Unreadable:
        return False
    return True


def _read(path: Path) -> tuple[int, memoryview]:
    """The format and the verified body of a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror or error})") from error
    header = _HEADER.match(content)
    if header is None:
        raise _Unreadable("is not a fastnas checkpoint")
    body = memoryview(content)[header.end() :]
    if hashlib.sha256(body).hexdigest().encode() != header[2]:
        raise _Unreadable("is damaged (its checksum is wrong)")
    return int(header[1]), body


def _load(body: memoryview, path: Path, method: str) -> dict[str, Any]:
    stream = io.BytesIO(body)
    try:
        writer = str(json.loads(stream.readline())["method"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Unreadable("does not say which method wrote it") from error
    if writer != method:
        raise UserError(
            f"the checkpoint {path} was written by method {writer}, not {method}; "
            "put the run's own checkpoint back, or start a new run in another folder"
        )
    # The zip archive of torch.save has to start at offset 0 of its stream.
    archive = io.BytesIO(stream.read())
    try:
        _check_archive(archive)
        state = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch answer forged files with errors of a dozen types
        raise _Unreadable(f"cannot be unpacked ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise _Unreadable("holds no state")
    return state


def _check_archive(stream: io.BytesIO) -> None:
    """Raise UnpicklingError for what `save_checkpoint` never writes, before torch reads it.

    weights_only keeps code from running; of what it lets through, packed entries and constructors such as
    ``bytearray(10**12)`` could still take all memory.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("packed entries")
        programs = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(programs) != 1:
            raise pickle.UnpicklingError("not one state")
        for opcode, argument, _ in pickletools.genops(archive.read(programs[0])):
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(argument) or opcode.name in _OTHER_CALLS:
                raise pickle.UnpicklingError(f"{opcode.name} {argument}")
    stream.seek(0)


def _check_plain(value: Any, place: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, element in value.items():
            _check_plain(key, f"a key of {place}")
            _check_plain(element, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, element in enumerate(value):
            _check_plain(element, f"{place}[{index}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"a checkpoint cannot hold {place}, a {type(value).__name__}: make it a plain value")
