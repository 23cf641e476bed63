"""Checkpoints that survive a kill at any moment and never run code when they are read.

A file is one header line, ``fastnas-checkpoint <format> <sha256 of the rest>``, one line of JSON naming the
method that wrote it, and the state as `torch.save` writes it. ``checkpoint.prev.pt`` beside ``checkpoint.pt``
is the one before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from fastnas import processes
from fastnas._files import replace_file
from fastnas.errors import UserError

FORMAT = 1
_HEADER = re.compile(rb"fastnas-checkpoint (\d{1,9}) ([0-9a-f]{64})\n")
_PLAIN = (int, float, bool, str, bytes, type(None), torch.Tensor, torch.nn.Parameter)


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
    writer = json.loads(stream.readline())["method"]
    if writer != method:
        raise UserError(
            f"the checkpoint {path} was written by method {writer}, not {method}; "
            "put the run's own checkpoint back, or start a new run in another folder"
        )
    # The zip archive of torch.save has to start at offset 0 of its stream.
    try:
        return torch.load(io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise _Unreadable(f"cannot be unpacked ({type(error).__name__})") from error


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
