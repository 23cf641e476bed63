"""Arrays of a numpy archive from anybody: nothing is unpickled, and no header makes the machine run out of memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(path: str | Path, wanted: Iterable[str], *, limit: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the ``wanted`` arrays that the archive has, and the names of all that it has.

    limit: bytes that one array may take. Raises OSError for a file that cannot be opened, and ValueError with a reason
    for anything that is not an archive of plain arrays within the limit.
    """
    with open(path, "rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not an npz archive")
            with zipfile.ZipFile(file) as archive:
                entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
                return {name: _read(archive, entries[name], limit) for name in wanted if name in entries}, list(entries)
        except Exception as error:  # zipfile, its decompressors and numpy answer damage with errors of a dozen types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(reason) from error


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> np.ndarray:
    name = entry.filename
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} has version {version[0]}.{version[1]} of the format, not 1.0 or 2.0")
        shape, _, dtype = _HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{name} holds Object arrays, which would have to be unpickled")
        if min(shape, default=0) < 0 or size != entry.file_size - file.tell():
            raise ValueError(f"{name} does not hold the {size:,} bytes that its header says")
        if size > limit:
            raise ValueError(f"{name} takes {size:,} bytes, and {limit:,} are the most")
    with archive.open(entry) as file:
        return npy.read_array(file, allow_pickle=False)
