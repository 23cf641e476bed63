"""Whatever a file holds, a parser gives its value or a UserError: no other error, no code run, no memory to speak of.

Each test takes mutations of valid files, most of them made below the checksums and archives that would stop them at
once, and every fourth case is arbitrary bytes. FASTNAS_FUZZ_CASES sets the cases of a test: 2,000, and 100,000 in
``make fuzz``. A failure names the seed of its case.
"""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnas import config, runs, search
from fastnas.data.npz import read_npz
from fastnas.engine.checkpoint import load_checkpoint, save_checkpoint
from fastnas.errors import UserError
from fastnas.spaces import PUBLISHED, load_genotype
from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.nasbench101 import Nasbench101Space, Nasbench101Table
from fastnas.spaces.nasbench201 import Nasbench201Space, read_nasbench201

CASES = int(os.environ.get("FASTNAS_FUZZ_CASES", 2000))
MEMORY = 2**30  # bytes that the process may map beyond what it has when the tests start

fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES <= 2000,  # the same cases each time in a test run, new ones at night
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**64 - 1)
TOKENS = [
    *(
        b"\x00",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\x7f" + b"\xff" * 7,
        b"-1",
        b"1e999",
        b"9" * 30,
        b"0x" + b"f" * 5000,
        b"NaN",
    ),
    *(b"[" * 300, b"(" * 300, b'{"a":' * 300, b"null", b"true", b'"', b"'", b",", b"\n", b"\\ud800", b"\xed\xa0\x80"),
    *(
        b"cbuiltins\nexec\n",
        b"c__builtin__\nbytearray\n",
        b"__import__('os').getpid()",
        b"9" * 5000,
        b"~nobody/",
        b"none",
    ),
]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few edits: bits, slices, and tokens that parsers trip over."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 4, 16, 200))
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * rng.choice((1, 2, 50))
            case 3:
                data[at:at] = rng.choice(TOKENS)
            case 4:
                token = rng.choice(TOKENS)
                data[at : at + len(token)] = token
            case _:
                data[at : at + size] = rng.randbytes(size)
    return bytes(data)


def mutate_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip archive with one entry mutated, packed, dropped or doubled, and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        entries = source.infolist()
        chosen = rng.randrange(len(entries))
        for index, entry in enumerate(entries):
            data, packing = source.read(entry), zipfile.ZIP_STORED
            if index == chosen:
                match rng.randrange(8):
                    case 0:
                        packing = zipfile.ZIP_DEFLATED
                    case 1:
                        continue
                    case 2:
                        data = source.read(rng.choice(entries))
                    case _:
                        data = mutate(data, rng)
            target.writestr(zipfile.ZipInfo(entry.filename), data, packing)
    return out.getvalue()


def case(files: Sequence[bytes], seed: int, *inner: Callable[[bytes, random.Random], bytes]) -> bytes:
    """The content of a case: mutated by one of ``inner`` or as a whole, or arbitrary."""
    rng = random.Random(seed)
    if seed % 4 == 0:
        return rng.randbytes(rng.choice((0, 3, 50, 2000)))
    content = rng.choice(files)
    kind = rng.choice((*inner, *inner, mutate))
    return kind(content, rng)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path("/dev/shm")
    return tmp_path_factory.mktemp("fuzz") / "file" if not folder.is_dir() else folder / f"fastnas-fuzz-{os.getpid()}"


@pytest.fixture(autouse=True)
def _clean(path: Path) -> Iterator[None]:
    yield
    path.unlink(missing_ok=True)


def accepts(parse: Callable[[], object]) -> object | None:
    """What a parser gives, None for a UserError; its message is one line for people."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's about odd literals
        try:
            return parse()
        except UserError as error:
            assert str(error)
            str(error).encode("utf-8", "backslashreplace")
            return None
        finally:
            assert not hasattr(builtins, "fastnas_was_here")


GENOTYPES = [
    *(PUBLISHED["DARTS_V2"].to_json().encode(), PUBLISHED["DARTS_V2"].to_darts().encode()),
    b"Genotype(normal=[('skip_connect', 0), ('none', 1)], normal_concat=range(2, 3), "
    b"reduce=[('max_pool_3x3', 1), ('max_pool_3x3', 0)], reduce_concat=[2])",
    Nasbench201Space().decode((3, 3, 4, 1, 3, 0)).to_json().encode(),
]


@fuzz
@given(seed=seeds)
def test_genotypes(seed: int, path: Path) -> None:
    path.write_bytes(case(GENOTYPES, seed))
    genotype = accepts(lambda: load_genotype(path))
    if genotype is not None:
        genotype.notation().encode("utf-8", "backslashreplace")
        path.write_bytes(genotype.to_json().encode())
        assert load_genotype(path) == genotype


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(fuzz, max_examples=max(CASES // 10, 1))
@given(
    value=JSON, key=st.sampled_from(["normal", "normal_concat", "reduce", "space", "rule", "version", "string", "x"])
)
def test_genotypes_of_arbitrary_json(value: object, key: str, path: Path) -> None:
    for content in (GENOTYPES[0], GENOTYPES[-1]):
        path.write_text(json.dumps(json.loads(content) | {key: value}), encoding="utf-8", errors="surrogatepass")
        genotype = accepts(lambda: load_genotype(path))
        if genotype is not None:
            genotype.to_json().encode()


SETTINGS = [
    config.dump_toml({**search.resolve({"data": "digits", "method": name}).as_mapping(), "versions": {"torch": "2"}})
    for name in ("darts", "parsec", "vaenas_os")
]


VALUES = [
    *("0x" + "f" * 5000, "9" * 5000, "9" * 40, "-1", "0", "1e999", "nan", "inf", "true", "[]", "{}", '""', '"none"'),
    *('"~nobody/x"', '"\\u0000"', "[" * 1000, "[[0x" + "f" * 5000 + "]]", "2020-01-01", '"\\U0010FFFF"', "[1, 2]"),
]


def mutate_setting(content: bytes, rng: random.Random) -> bytes:
    """One setting gets another value, or the value of another setting."""
    lines = content.decode().splitlines()
    at, other = rng.randrange(len(lines)), rng.choice(lines).partition(" = ")[2]
    lines[at] = f"{lines[at].partition(' = ')[0]} = {rng.choice((rng.choice(VALUES), other))}"
    return "\n".join(lines).encode()


@fuzz
@given(seed=seeds)
def test_settings(seed: int, path: Path) -> None:
    path.write_bytes(case([text.encode() for text in SETTINGS], seed, mutate_setting))
    accepts(lambda: search.resolve({}, config.read_toml(path)))


FLAGS = [action.option_strings[0] for action in search.build_parser()._actions if action.option_strings]


@settings(fuzz, max_examples=max(CASES // 20, 1))
@given(flag=st.sampled_from(FLAGS), value=st.text(max_size=12) | st.sampled_from([t.decode("latin1") for t in TOKENS]))
def test_flags(flag: str, value: str) -> None:
    if flag in ("-h", "--help"):
        return
    try:
        arguments = vars(search.build_parser().parse_args([f"{flag}={value}"]))
    except SystemExit:  # its message is tested in test_cli.py
        return
    arguments = {key: value for key, value in arguments.items() if key not in ("resume", "out", "quiet", "debug")}
    accepts(lambda: search.resolve({key: value for key, value in arguments.items() if value is not None}))


@fuzz
@given(seed=seeds)
def test_metrics(seed: int, path: Path) -> None:
    path.with_name(f"{path.name}.d").mkdir(exist_ok=True)
    run = runs.RunFolder(path.with_name(f"{path.name}.d"))
    lines = b"".join(json.dumps({"epoch": epoch, "loss": 2.5, "genotype": "x"}).encode() + b"\n" for epoch in range(3))
    values = json.dumps({"epoch": 1.5, "genotype": {"epoch": [1]}}).encode() + b"\n"
    run.metrics_path.write_bytes(case([lines, lines + values, b"[" * 10_000 + b"\n"], seed))
    run.truncate(1)
    assert all(record["epoch"] <= 1 for record in run.metrics())
    run.metrics_path.unlink()
    run.path.rmdir()


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("import builtins; builtins.fastnas_was_here = True",)


def checkpoints(path: Path) -> list[bytes]:
    """The bodies of checkpoints: what the checksum is of."""
    state = {"epoch": 1, "w": torch.arange(6.0).view(2, 3), "step": torch.tensor(3), "lr": [0.1, None], "name": "a"}
    save_checkpoint(path, state, method="darts")
    plain = path.read_bytes().split(b"\n", 1)[1]
    module = torch.nn.BatchNorm2d(2)
    save_checkpoint(path, {"module": module.state_dict(), "p": torch.nn.Parameter(torch.ones(2))}, method="darts")
    return [plain, path.read_bytes().split(b"\n", 1)[1], hostile_body(plain)]


def hostile_body(body: bytes) -> bytes:
    """The same archive with a state that runs code when it is unpickled without care."""
    head, archive = body.split(b"\n", 1)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            bomb = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickle.dumps({"epoch": Bomb()}, 2) if bomb else source.read(entry))
    return head + b"\n" + out.getvalue()


def sealed(body: bytes) -> bytes:
    return f"fastnas-checkpoint 1 {hashlib.sha256(body).hexdigest()}\n".encode() + body


def mutate_sealed(body: bytes, rng: random.Random) -> bytes:
    return sealed(mutate(body, rng))


def mutate_state(body: bytes, rng: random.Random) -> bytes:
    head, archive = body.split(b"\n", 1)
    return sealed(head + b"\n" + mutate_archive(archive, rng))


def test_checkpoints(path: Path) -> None:
    bodies = checkpoints(path)
    path.with_name(f"{path.stem}.prev{path.suffix}").unlink(missing_ok=True)
    accepted = 0

    @fuzz
    @given(seed=seeds)
    def run(seed: int) -> None:
        nonlocal accepted
        path.write_bytes(case(bodies, seed, mutate_sealed, mutate_state))
        state = accepts(lambda: load_checkpoint(path, method="darts"))
        accepted += state is not None
        assert state is None or isinstance(state, dict)
        torch.save(state, io.BytesIO())  # reads every tensor

    run()
    assert accepted > CASES // 100  # the mutations reach the state and not only its envelope


def archive_of(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


X = np.arange(12 * 4 * 4, dtype=np.uint8).reshape(12, 4, 4)
Y = np.arange(12) % 3
ARCHIVES = [archive_of(x=X, y=Y), archive_of(x_train=X, y_train=Y, x_test=X, y_test=Y.astype(np.uint8))]


@fuzz
@given(seed=seeds)
def test_npz(seed: int, path: Path) -> None:
    path.write_bytes(case(ARCHIVES, seed, mutate_archive))
    accepts(lambda: read_npz(path))


TABLE_101 = archive_of(
    num_vertices=np.uint8([4, 2]),
    adj_bits=np.uint32([27, 1]),
    ops=np.uint8([[2, 0, 255, 255, 255], [255] * 5]),
    test_hits=np.uint16([14976, 3]),
    params=np.int32([7, 8]),
)


@fuzz
@given(seed=seeds)
def test_nasbench101_tables(seed: int, path: Path) -> None:
    path.write_bytes(case([TABLE_101], seed, mutate_archive))
    table = accepts(lambda: Nasbench101Table.read(path))
    if table is not None:
        table.row((*(int(bit in (0, 1, 18)) for bit in range(21)), *[0] * 5))


ROWS = "".join(f"{i},{Nasbench201Space().text((i % 5,) * 6)},{90 + i}.5,{i}\n" for i in range(5))
TABLE_201 = ("index,arch,c10_test,params_c10\n" + ROWS).encode()


def mutate_packed(content: bytes, rng: random.Random) -> bytes:
    return gzip.compress(mutate(content, rng), 1, mtime=0)


@fuzz
@given(seed=seeds)
def test_nasbench201_tables(seed: int, path: Path) -> None:
    path.write_bytes(case([TABLE_201, gzip.compress(TABLE_201)], seed, mutate, mutate_packed))
    accepts(lambda: read_nasbench201(path))


def packed_zeros(name: str, header: bytes, size: int) -> bytes:
    """An archive whose entry is a thousand times larger than itself."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as file:
        file.write(header)
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return out.getvalue()


def claim(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    "shape",
    [(2**40,), (2**62, 2**62), (2**31, 2**31, 4), (-1,), (10**30,)],
    ids=["1 TiB", "wraps", "8 EiB", "-1", "huge"],
)
def test_headers_that_claim_too_much(shape: tuple[int, ...], path: Path) -> None:
    for name, read in (("x.npy", read_npz), ("num_vertices.npy", Nasbench101Table.read)):
        path.write_bytes(packed_zeros(name, claim(shape), 2**20))
        with pytest.raises(UserError, match="header says|are the most"):
            read(path)


def test_tables_that_unpack_to_too_much(path: Path) -> None:
    size = 64 * 2**20
    path.write_bytes(packed_zeros("num_vertices.npy", claim((size,)), size))
    with pytest.raises(UserError, match="are the most"):
        Nasbench101Table.read(path)
    path.write_bytes(gzip.compress(b"arch,a\n" + bytes(size)))
    with pytest.raises(UserError, match="it has more than"):
        read_nasbench201(path)
    path.write_bytes(b"arch," + b"a," * 10_000 + b"\n1,2\n")
    with pytest.raises(UserError, match="no header line of at most"):
        read_nasbench201(path)


def test_checkpoints_that_unpack_to_too_much(path: Path) -> None:
    body = b'{"method": "darts"}\n' + packed_zeros("archive/data/0", b"", 64 * 2**20)
    path.write_bytes(sealed(body))
    with pytest.raises(UserError, match="cannot be unpacked"):
        load_checkpoint(path, method="darts")
    save_checkpoint(path, {"a": torch.ones(2)}, method="darts")
    body = path.read_bytes().split(b"\n", 1)[1]
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body.split(b"\n", 1)[1])) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            greedy = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."
            target.writestr(entry.filename, greedy if entry.filename.endswith("data.pkl") else source.read(entry))
    path.write_bytes(sealed(b'{"method": "darts"}\n' + out.getvalue()))
    path.with_name(f"{path.stem}.prev{path.suffix}").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"cannot be unpacked \(UnpicklingError\)"):
        load_checkpoint(path, method="darts")


@pytest.mark.parametrize("space", [Nasbench201Space, Nasbench101Space])
def test_a_cell_of_the_wrong_length_is_in_no_table(space: type, path: Path, tmp_path: Path) -> None:
    from fastnas import lookup

    (tmp_path / "g.json").write_text(ArchitectureString(space.name, (4, 4, 4)).to_json())
    path.write_bytes(TABLE_201 if space is Nasbench201Space else TABLE_101)
    with pytest.raises(UserError, match="cell of NAS-Bench"):
        lookup.look_up(str(tmp_path / "g.json"), path)
