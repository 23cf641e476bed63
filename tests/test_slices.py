"""Every op has its whole slice, and every package on disk is in the wheel."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import fastnas
from fastnas import _backends
from fastnas import ops as _ops  # noqa: F401  registers the ops

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
STEMS = sorted(p.stem for p in (ROOT / "fastnas" / "ops").glob("[a-z]*.py"))
# The engine's own ops; what they share defines none.
STAGES = sorted(p.stem for p in (ROOT / "fastnas" / "ops" / "stages").glob("*.py") if "= define(" in p.read_text())
# These have no backend of their own: they go with those of the stages that they are made of.
PUT_TOGETHER = {"norm_stage", "source_stage"}
SLICE = [
    "fastnas/ops/{}.py",
    "fastnas/reference/{}.py",
    "csrc/ops/{}.cpp",
    "tests/ops/test_{}.py",
    "bench/test_{}.py",
    "docs/ops/{}.md",
]


def test_the_named_ops_are_there() -> None:
    assert {"mixed_sum", "path_dropout", "partial_shuffle", "gumbel_softmax"} <= set(STEMS)
    assert {*STEMS, *STAGES} - PUT_TOGETHER == set(_backends._flat_ops)


@pytest.mark.parametrize("path", SLICE)
def test_every_op_has_its_whole_slice_and_no_file_is_left_over(path: str) -> None:
    missing = [stem for stem in STEMS if not (ROOT / path.format(stem)).is_file()]
    assert not missing, f"{path} is missing for {missing}"
    folder, pattern = (ROOT / path).parent, Path(path).name.format("*")
    found = {p.name for p in folder.glob(pattern) if not p.name.startswith("_")}
    known = {Path(path.format(stem)).name for stem in STEMS}
    # Of several ops: calls, results beyond the caches, one page for all stages.
    assert found - known <= {"test_overhead.py", "test_large_results.py", "index.md", "stages.md"}


@pytest.mark.parametrize("stem", STEMS)
def test_reference_takes_the_arguments_of_the_public_function(stem: str) -> None:
    reference = getattr(__import__(f"fastnas.reference.{stem}", fromlist=[stem]), stem)
    public = getattr(fastnas, stem)
    assert list(inspect.signature(reference).parameters) == list(inspect.signature(public).parameters)
    for word in ("Args:", "Returns:", "Raises:"):
        assert word in public.__doc__, f"the docstring of {stem} has no {word!r}"


@pytest.mark.parametrize("stem", STEMS)
def test_the_library_implements_the_flat_ops_that_the_schema_defines(stem: str) -> None:
    schemas = set(re.findall(rf'"({stem}_\w+)\(', (ROOT / f"fastnas/ops/{stem}.py").read_text()))
    kernels = set(re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/ops/{stem}.cpp").read_text()))
    assert schemas == kernels == set(_backends._flat_ops[stem])


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_cuda_sources_implement_all_flat_ops_of_theirs_and_have_value_tests(path: Path) -> None:
    kernels = set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
    assert kernels == set(_backends._flat_ops[path.stem])
    assert (ROOT / "tests" / "kernels" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("stem", STAGES)
def test_the_library_implements_the_stages(stem: str) -> None:
    schemas = set(re.findall(rf'"({stem.split("_")[0]}_\w+)\(', (ROOT / f"fastnas/ops/stages/{stem}.py").read_text()))
    kernels = set(re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/ops/stages/{stem}.cpp").read_text()))
    assert schemas == kernels
    assert stem in PUT_TOGETHER or kernels == set(_backends._flat_ops[stem])


def test_packages_in_pyproject_are_the_folders_on_disk() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "fastnas").rglob("*.py")} | {
        "fastnas.kernels"
    }
    assert listed == on_disk


def test_kernels_are_the_folder_beside_the_package() -> None:
    import fastnas.kernels

    assert Path(fastnas.kernels.__file__).parent in (
        ROOT / "kernels",
        Path(fastnas.__file__).parent / "kernels",
    )
