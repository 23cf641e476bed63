"""What a run is made of, as short digests: two runs with equal ones are the same experiment.

`run_hashes` goes into config.toml as the table ``[hashes]``. Machine, device, threads and the versions of PyTorch and
Python are not in it: they stand beside it, among the settings and in ``[versions]``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastnas import _ext
from fastnas.data import Data
from fastnas.settings import CHANGEABLE_ON_RESUME

DIGITS = 16  # of the 64 of SHA-256: enough to tell apart all runs that anybody will make
_SOURCES = (".py", ".toml", ".json")  # the files of a package that decide what it computes
# Where things lie and what is written besides; what the data are has a digest of its own.
_WITHOUT_EFFECT = CHANGEABLE_ON_RESUME | {"data", "download", "tensorboard", "warm_start"}


def run_hashes(settings: Mapping[str, Any], images: Data) -> dict[str, str]:
    """Hexadecimal digests of a run: of its `configuration`, its `data`, its `code` and the compiled `kernels`, and
    `run` over all four.

    `settings`: the flat table of config.toml; those that only say where something lies or runs are left out.
    `images`: every pixel and label where they are in memory, names and sizes of the files where they are streamed.
    """
    kept = {name: str(value) for name, value in settings.items() if name not in _WITHOUT_EFFECT}
    stores = (images.train_and_search.store, images.test.store)
    parts = {
        "configuration": digest([json.dumps(kept, sort_keys=True).encode()]),
        "data": digest(part for store in stores for part in store.contents()),
        "code": code_digest(),
        "kernels": kernels_digest(),
    }
    return {"run": digest(part.encode() for part in parts.values())} | parts


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the parts, each after its length, cut to `DIGITS` hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()[:DIGITS]


@functools.cache
def code_digest() -> str:
    """Names and contents of the sources of fastnas and its Triton kernels, as they are installed."""
    parts: list[bytes] = []
    for package in ("fastnas", "fastnas.kernels"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr, index]
        files = (path for path in root.rglob("*") if path.suffix in _SOURCES and not path.name.startswith("_build"))
        for path in sorted(files):
            parts += [path.relative_to(root).as_posix().encode(), path.read_bytes()]
    return digest(parts)


@functools.cache
def kernels_digest() -> str:
    """The compiled library for this processor, or ``"none"``. Two compilers give two digests for one source."""
    found = [importlib.util.find_spec(name).origin for name in _ext.modules().values()]  # type: ignore[union-attr]
    return digest(Path(path).read_bytes() for path in found) if found else "none"
