"""Files that are either wholly the old or wholly the new ones, whenever the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fastnas import processes


def replace_file(path: Path, chunks: Iterable[bytes], *, keep: Path | None = None) -> None:
    """Write ``chunks`` to ``path`` atomically and durably; the old content, if any, stays under ``keep``.

    Of several processes that work as one only the first writes.
    Raises OSError naming ``path``; the old file is then untouched and no temporary file is left.
    """
    if not processes.is_main():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _link_or_move(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _link_or_move(path: Path, keep: Path) -> None:
    """Give the file of ``path`` the name ``keep`` too; where there are no hard links, only that name."""
    second = keep.with_name(keep.name + ".tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        os.replace(path, keep)
        return
    try:
        os.replace(second, keep)
    finally:
        # rename(2) does nothing between two names of one file, which a kill in mid-save leaves.
        second.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
