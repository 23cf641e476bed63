"""The examples run, and give the same numbers as plain PyTorch."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["branches", "drop_path_resnet", "shufflenet_block"])
def test_example(name, monkeypatch, capsys):
    if name != "branches":
        pytest.importorskip("torchvision", reason="this example changes a torchvision model")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() < 1e-4
    printed = capsys.readouterr().out
    assert "fused" in printed
    if name == "branches":
        assert "branch 5 (the target is branch 5)" in printed
