from __future__ import annotations

import subprocess
import sys


def test_import_loads_no_heavy_package() -> None:
    code = "import fastnas.data, sys; print(*{'torchvision', 'sklearn', 'PIL', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.stderr) == ("", "")
