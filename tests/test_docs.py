"""The documentation: its commands are accepted, its links and result files exist, its Python runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastnas import cli, retrain, search
from fastnas.config import given
from fastnas.methods import METHODS, WeightSettings
from fastnas.settings import DataSettings, RuntimeSettings

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
SEPARATORS = {"&", "&&", "|", "||", ";"}
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.")  # `--channels C`: to be filled in by the reader
SEARCHES = (
    *(search.SearchSettings, DataSettings, WeightSettings, RuntimeSettings),
    *(method.Settings for method in METHODS.values()),
)
SETTINGS = {
    "fastnas.search": SEARCHES,
    "fastnas.repeat": SEARCHES,
    "fastnas.retrain": (retrain.RetrainSettings, DataSettings, RuntimeSettings),
}


def code_lines(page: Path) -> Iterator[str]:
    """Lines of indented and of shell code, and inline code that starts like a command; no Python code."""
    fence, text = "", page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip() + " "
        elif fence.startswith(("```sh", "```bash", "```console")) or (not fence and line.startswith("    ")):
            yield line.strip()
        elif not fence:
            yield from re.findall(r"`((?:python|make) [^`]+)`", line)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command, comments left out."""
    for line in code_lines(page):
        if not re.match(r"(python|make|torchrun) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield words
                words = []


def all_commands(pattern: str) -> list[Any]:
    """The commands of all pages that match, each once."""
    found = {shlex.join(words): page for page in PAGES for words in commands(page)}
    return [pytest.param(text, id=f"{page.name}: {text}") for text, page in found.items() if re.match(pattern, text)]


class Parsed(Exception):
    """Carries what a command line was read as, out of the command."""


@pytest.fixture
def parse(monkeypatch):
    """Reads the arguments of `python -m fastnas.X` with the command's own parser, and runs nothing."""
    original = cli.ArgumentParser.parse_args

    def stop(self: Any, *arguments: Any) -> None:
        raise Parsed(original(self, *arguments))

    def parse(module: str, arguments: list[str]) -> Any:
        monkeypatch.setattr(cli.ArgumentParser, "parse_args", stop)
        package = importlib.import_module(module)
        command = importlib.import_module(f"{module}.__main__") if hasattr(package, "__path__") else package
        with pytest.raises(Parsed) as caught:
            command.main(arguments)
        return caught.value.args[0]

    return parse


@pytest.mark.parametrize("text", all_commands(r"python -m fastnas\."))
def test_a_command_of_the_documentation_is_accepted(text, parse):
    module, *arguments = shlex.split(text)[2:]
    if arguments == ["--help"]:
        return
    if any(PLACEHOLDER.fullmatch(word) for word in arguments):  # no values to check, but the flags must be there
        check_flags(Path(importlib.import_module(module).__file__ or ""), arguments)
        return
    namespace = parse(module, arguments)
    preset = getattr(namespace, "preset", None)
    if module not in SETTINGS or getattr(namespace, "resume", None) or "/" in str(preset):
        return
    flags = given(namespace, *SETTINGS[module]) | ({"preset": preset} if preset else {})
    (retrain if module == "fastnas.retrain" else search).resolve(flags)  # names, ranges, whose setting it is


def check_flags(script: Path, arguments: list[str]) -> None:
    """A script has each flag among the arguments, or the settings that it takes have."""
    sources = [script, ROOT / "fastnas/settings.py", ROOT / "fastnas/methods/base.py"]
    known = "".join(path.read_text(encoding="utf-8") for path in sources)
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        field = flag.removeprefix("--").replace("-", "_")
        assert f'"{flag}"' in known or re.search(rf"\b{field}: ", known), flag


@pytest.mark.parametrize("text", all_commands(r"python (bench|examples)/|python -m bench\."))
def test_a_script_of_the_documentation_is_there(text):
    words = shlex.split(text)[1:]
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    check_flags(ROOT / words[0], words[1:])


@pytest.mark.parametrize("text", all_commands("make "))
def test_a_make_target_of_the_documentation_is_there(text):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shlex.split(text)[1] in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_result_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"^\[\d+\]: (\S+)$", text, re.MULTILINE):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"bench/results/[\w.*-]+\.(?:json|svg)", text):
        assert list(ROOT.glob(name)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_documentation_compiles_and_that_of_the_readme_runs(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        code = compile(block, str(page), "exec")
        if page.name == "README.md":
            exec(code, {})


def test_the_site_lists_pages_that_are_there_and_loads_no_fonts():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"([\w/]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert len(pages) > 20 and len(set(pages)) == len(pages)
    assert [page for page in pages if not (ROOT / "docs" / page).exists()] == []
    assert "font: false" in text
    for name in re.findall(
        r"^::: (\S+)$", "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md")), re.M
    ):
        importable(name)


def importable(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_figures_of_the_front_pages_are_those_of_the_result_files():
    results = ROOT / "bench" / "results"
    (darts,) = (
        row for row in json.loads((results / "footprints.json").read_text())["rows"] if row.get("pass") == "DARTS"
    )
    times = json.loads((results / "search_step_darts.json").read_text())["rows"]
    saved = [darts[f"{executor}_saved"] / 1e9 for executor in ("plain", "fused", "lean")]
    milliseconds = [f"{round(times[row]['ms']):,}" for row in ("plain", "plain_channels_last", "fused", "fused_lean")]
    readme, home, executor = ((ROOT / name).read_text() for name in ("README.md", "docs/index.md", "docs/executor.md"))
    assert f"saves {saved[0]:.2f} GB, fused {saved[1]:.2f}, lean {saved[2]:.2f}" in readme
    assert f"takes {milliseconds[0]} ms, fused {milliseconds[2]} ms" in readme
    assert f"| {saved[0]:.2f} GB | {saved[1]:.2f} GB | {1e3 * saved[2]:.0f} MB |" in home
    for text in milliseconds:
        assert f"{text} ms" in home and f"{text} ms" in executor


@pytest.mark.parametrize("page", TOP[:1], ids=["README.md"])
def test_lines_are_short(page):
    """Rows of tables may be longer: they cannot be wrapped."""
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= (130 if line.startswith("|") else 120), line
