"""Settings: defaults, then preset, then flags, each checked and explained."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from fastnas import config
from fastnas.config import add_flags, dump_toml, given, merge, option, read_preset, read_toml
from fastnas.errors import UserError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Common:
    method: str = option("darts", "search method", choices=("darts", "parsec"))
    batch_size: int = option(64, "images a step", minimum=1)
    data_dir: Path | None = option(None, "folder of the data")
    augment: bool = option(True, "crop and flip, 50% each")
    seed: int = option(0, "seed", minimum=0, maximum=10)


@dataclass(frozen=True)
class Darts:
    lr: float = option(0.025, "learning rate of the weights", above=0)
    betas: tuple[float, ...] = option((0.5, 0.999), "betas of Adam", minimum=0, maximum=1)
    clip: float | None = option(5.0, "largest gradient norm", above=0)


@dataclass(frozen=True)
class Parsec:
    lr: float = option(0.1, "learning rate of the weights", above=0)
    samples: int = option(16, "architectures a step", minimum=1)


METHODS = {"darts": Darts, "parsec": Parsec}


def settings(*layers: dict) -> tuple[Common, Darts]:
    return merge((Common, Darts), *layers, others=METHODS)


def from_flags(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser, Common, *METHODS.values())
    return given(parser.parse_args(arguments), Common, *METHODS.values())


def test_defaults():
    assert settings() == (Common(), Darts())


def test_later_layers_win():
    common, darts = settings({"batch_size": 96, "lr": 0.1}, {"batch_size": 32})
    assert (common.batch_size, darts.lr) == (32, 0.1)


def test_only_given_flags_override():
    assert from_flags() == {}
    assert from_flags("--batch-size", "8", "--no-augment") == {"batch_size": 8, "augment": False}


def test_flags_of_every_type():
    arguments = ["--data-dir", "~/x", "--betas", "0.9,1", "--clip", "none", "--lr", "1", "--augment"]
    common, darts = settings(from_flags(*arguments))
    assert common.data_dir == Path.home() / "x"
    assert common.augment is True
    assert darts == Darts(lr=1.0, betas=(0.9, 1.0), clip=None)
    assert type(darts.lr) is float and type(darts.betas) is tuple


def test_help_shows_defaults_of_each_owner():
    parser = argparse.ArgumentParser(prog="search")
    add_flags(parser, Common, *METHODS.values())
    text = " ".join(parser.format_help().split())
    assert "--lr FLOAT learning rate of the weights [0.025 or 0.1]" in text
    assert "--augment, --no-augment crop and flip, 50% each [on]" in text
    assert "--betas FLOAT betas of Adam [0.5,0.999]" in text
    assert "--method {darts,parsec}" in text
    assert "[none]" in text


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"batch_size": True}, "batch-size must be an integer, got True"),
        ({"batch_size": 1.0}, "batch-size must be an integer, got 1.0"),
        ({"batch_size": "many"}, "batch-size must be an integer, got 'many'"),
        ({"seed": 11}, "seed must be at most 10, got 11"),
        ({"lr": 0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a number, got nan"),
        ({"lr": False}, "lr must be a number, got False"),
        ({"clip": "high"}, "clip must be a number or 'none', got 'high'"),
        ({"betas": 0.5}, "betas must be a list, got 0.5"),
        ({"betas": [0.5, 2]}, "each of betas must be at most 1, got 2.0"),
        ({"augment": "yes"}, "augment must be true or false, got 'yes'"),
        ({"data_dir": 3}, "data-dir must be a path or 'none', got 3"),
        ({"lr": "none"}, "lr must be a number, got 'none'"),
        ({"method": "dart"}, "method must be one of darts, parsec, got 'dart'; did you mean 'darts'?"),
        ({"batchsize": 1}, "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ({"zzz": 1}, "unknown setting 'zzz'; --help lists all settings"),
        ({"samples": 4}, "samples is a setting of parsec, not of the chosen method"),
    ],
)
def test_wrong_input_is_named(layer, message):
    with pytest.raises(UserError) as caught:
        settings(layer)
    assert str(caught.value) == message


def test_unreadable_flag_is_named():
    with pytest.raises(UserError, match="batch-size must be an integer, got '1e3'"):
        settings(from_flags("--batch-size", "1e3"))


def test_shared_field_reaches_both_classes():
    assert merge((Darts, Parsec), {"lr": 1}) == (Darts(lr=1.0), Parsec(lr=1.0))


def test_programming_errors_are_type_errors():
    @dataclass(frozen=True)
    class Odd:
        lr: dict = option(None, "no setting has this type")

    @dataclass(frozen=True)
    class Clash:
        lr: int = option(1, "another type than Darts.lr")

    with pytest.raises(TypeError, match=r"Odd\.lr"):
        merge((Odd,))
    with pytest.raises(TypeError, match="differ in the type of lr"):
        add_flags(argparse.ArgumentParser(), Darts, Clash)


def test_toml_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('batch-size = 8\nbetas = [0, 1]\nclip = "none"\n[versions]\ntorch = "2"\n')
    layer = read_toml(path)
    assert settings(layer) == (Common(batch_size=8), Darts(betas=(0.0, 1.0), clip=None))
    path.write_text("batch_size = 0\n")
    with pytest.raises(UserError, match=rf"^{path}: batch-size must be at least 1"):
        settings(read_toml(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not valid TOML"),
        (b"[optimizer]\nlr = 1\n", r"\[optimizer\] is a table"),
        (b"a = '\xff'\n", "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_unreadable_toml(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_toml(path)


def test_presets(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "darts-cifar10.toml").write_text("batch_size = 7\n")
    (tmp_path / "presets" / "notes.txt").write_text("no preset\n")
    monkeypatch.setattr(config.resources, "files", lambda package: tmp_path)
    assert config.preset_names() == ["darts-cifar10"]
    assert read_preset("darts-cifar10") == {"batch_size": 7}
    assert read_preset("darts-cifar10").source == "preset darts-cifar10"
    assert read_preset(str(tmp_path / "presets" / "darts-cifar10.toml")) == {"batch_size": 7}
    with pytest.raises(UserError, match=r"unknown preset 'darts-cifar'; did you mean 'darts-cifar10'\?"):
        read_preset("darts-cifar")


def test_resolved_settings_round_trip(tmp_path):
    path = tmp_path / "config.toml"
    common = Common(batch_size=3, data_dir=Path("a b"), augment=False)
    darts = Darts(lr=1e-9, clip=None, betas=())
    path.write_text(dump_toml({**asdict(common), **asdict(darts), "versions": {"torch": "2.11.0"}}))
    assert settings(read_toml(path)) == (common, darts)
    assert tomllib.loads(path.read_text())["versions"] == {"torch": "2.11.0"}


values = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.floats(allow_nan=False), max_size=3),
)


@for_all(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), values, max_size=4))
def test_dumped_toml_reads_back(table):
    assert tomllib.loads(dump_toml(table)) == table


def test_dump_refuses_what_toml_lacks():
    with pytest.raises(TypeError, match="TOML has no form"):
        dump_toml({"x": object()})


def test_did_you_mean():
    assert did_you_mean("Darts", ["darts", "parsec"]) == "; did you mean 'darts'?"
    assert did_you_mean("qqq", ["darts", "parsec"]) == ""
