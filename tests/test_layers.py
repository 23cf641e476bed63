"""Imports point one way: reference, kernels -> ops -> nn -> spaces -> engine -> methods -> command lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["reference", "kernels", "ops", "nn", "spaces", "engine", "methods"]
# These hang off: the profiler counts for engine and methods, the others serve commands.
SIDES = {"data", "profiler", "report"}
MAY_USE = {
    "engine": {"profiler"},
    "methods": {"profiler"},
    "profiler": {"engine", "ops"},
    "report": {"profiler", "engine", "methods"},
}
# Picking a backend by a context manager loads the ops, so that there is something to pick for.
LAZY = {("fastnas._backends", "fastnas.ops")}


def paths() -> dict[str, Path]:
    """All modules by their names."""
    found = {}
    for folder in ("fastnas", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "fastnas" else ("fastnas", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


PATHS = paths()


def imported(nodes: list[ast.stmt], inside: bool) -> Iterator[str]:
    """Modules of fastnas that statements import; ``inside``: in functions too, or only when the module loads."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastnas":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in PATHS else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastnas")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            children = (
                [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)] if inside else []
            )
            yield from imported(children or list(getattr(node, "body", [])), inside=False)


@cache
def imports(module: str, inside: bool = True) -> frozenset[str]:
    return frozenset(imported(ast.parse(PATHS[module].read_text(encoding="utf-8")).body, inside)) - {module}


def package(module: str) -> str:
    """`ops` for fastnas.ops.mixed_sum, and the module's own name for what lies in fastnas itself."""
    return module.split(".")[1] if "." in module else ""


def is_command(module: str) -> bool:
    return module.count(".") == 1 and '__name__ == "__main__"' in PATHS[module].read_text(encoding="utf-8")


def is_alone(module: str) -> bool:
    """Whether a module lies in fastnas itself and is no command."""
    return module == "fastnas" or (
        module.count(".") == 1 and package(module) not in {*ORDER, *SIDES} and not is_command(module)
    )


@cache
def is_foundation(module: str) -> bool:
    """Whether a module of fastnas itself, such as errors or config, needs nothing but its like."""
    seen, ahead = set(), [module]
    while ahead:
        current = ahead.pop()
        if current in seen:
            continue
        seen.add(current)
        if not is_alone(current):
            return False
        if current != "fastnas":
            ahead += [other for other in imports(current) if (current, other) not in LAZY]
    return True


@pytest.mark.parametrize("module", [m for m in PATHS if package(m) in {*ORDER, *SIDES}])
def test_packages_import_what_comes_before_them(module: str) -> None:
    own = package(module)
    allowed = {own, *MAY_USE.get(own, set()), *(ORDER[: ORDER.index(own)] if own in ORDER else {"spaces", "nn"})}
    for other in imports(module):
        # A report is of runs, and has a command line.
        if own == "report" and other in ("fastnas.runs", "fastnas.cli", "fastnas.settings"):
            continue
        assert is_foundation(other) or package(other) in allowed, f"{module} imports {other}"


def test_nothing_but_commands_imports_commands() -> None:
    commands = {module for module in PATHS if is_command(module)}
    assert {"fastnas.search", "fastnas.retrain", "fastnas.profile", "fastnas.info"} <= commands
    as_library = {"fastnas.api", "fastnas.trained"}  # the commands, and what they left behind, as calls
    for module in set(PATHS) - commands - as_library:
        if package(module) not in SIDES:
            assert not imports(module) & commands, module


def test_no_module_needs_itself_to_load() -> None:
    """No cycle of imports among those that run when a module loads."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module, inside=False) & set(PATHS)):
                if other != "fastnas":
                    visit(other, (*above, module))
            done.add(module)

    for module in PATHS:
        visit(module, ())
