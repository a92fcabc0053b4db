"""The embedded corpus, from a made-up library and from the real one."""

import platform
import sysconfig
import time
from pathlib import Path

import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.stdlib import StdlibSource, split_of, stdlib_files

KEPT = ["abc.py", "json/__init__.py", "json/decoder.py", *(f"pkg/m{n:02}.py" for n in range(40)), "zlib.py"]
LEFT_OUT = [
    "config-3.11-x86_64/python-config.py",
    "dist-packages/d.py",
    "idlelib/i.py",
    "json/__pycache__/decoder.py",
    "json/tests/test_decoder.py",
    "lib2to3/l.py",
    "notes.txt",
    "site-packages/numpy/n.py",
    "test/test_abc.py",
    "turtledemo/t.py",
]


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "lib"
    for name in KEPT + LEFT_OUT:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# the source of {name}\n")
    (root / "abc.py").write_bytes(b"# caf\xe9\n")
    return root


def test_the_files_and_their_splits(library):
    assert stdlib_files(library) == sorted(KEPT)
    held_out = [path for path in KEPT if split_of(path) == "validation"]
    assert 0 < len(held_out) < 8
    assert sum(split_of(f"a/b{n}.py") == "validation" for n in range(4000)) == pytest.approx(200, abs=50)


def test_documents_come_in_path_order_with_their_domains(library, tmp_path):
    source = StdlibSource(library, tmp_path / "tfds")
    assert source.domains == ("abc", "json", "pkg", "zlib") and source.python == platform.python_version()
    for split in ("train", "validation"):
        paths = [path for path in sorted(KEPT) if split_of(path) == split]
        documents = list(source.documents(split))
        assert [source.domains[document.domain] for document in documents] == [
            path.split("/")[0][:4].rstrip(".") for path in paths
        ]
        texts = {path: f"# the source of {path}\n" for path in paths} | {"abc.py": "# caf\ufffd\n"}
        assert [document.text for document in documents] == [texts[path] for path in paths]


def test_the_hash_follows_names_and_contents(library, tmp_path):
    first = StdlibSource(library, tmp_path).hash
    assert StdlibSource(library, tmp_path / "elsewhere").hash == first
    (library / "test" / "more.py").write_text("left out")
    assert StdlibSource(library, tmp_path).hash == first
    (library / "zlib.py").rename(library / "zlic.py")
    renamed = StdlibSource(library, tmp_path).hash
    (library / "zlic.py").write_text("changed")
    assert len({first, renamed, StdlibSource(library, tmp_path).hash}) == 3


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_dataset_is_made_anew(library, tmp_path, damage):
    source = StdlibSource(library, tmp_path / "tfds")
    want = list(source.documents("train"))
    (records,) = (tmp_path / "tfds").rglob("*train*array_record*")
    records.write_bytes(damage(records.read_bytes()))
    assert list(source.documents("train")) == want


def test_a_library_without_files_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="found no"):
        StdlibSource(tmp_path, tmp_path)


def test_the_real_library(tmp_path, capfd):
    config = DataConfig(cache=str(tmp_path))
    start = time.perf_counter()
    corpus = open_corpus(config)
    built = time.perf_counter()
    again = open_corpus(config)
    assert built - start < 20 and time.perf_counter() - built < 5
    assert again.info == corpus.info and capfd.readouterr().out == ""
    info = corpus.info
    assert info.python == platform.python_version() and info.vocab_size == 256 and len(info.hash) == 64
    assert {"asyncio", "json", "abc"} <= set(info.domains) and "test" not in info.domains
    root = Path(sysconfig.get_path("stdlib"))
    with_text = [path for path in stdlib_files(root) if (root / path).stat().st_size]
    assert info.train.documents + info.validation.documents == len(with_text)
    assert info.train.bytes == info.train.tokens > 5_000_000 and info.validation.tokens > 100_000
    assert info.domains[corpus.train.domains[0]] == "__future__"
