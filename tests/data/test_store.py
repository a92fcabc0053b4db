"""The token cache: built once, shared, and never trusted when damaged."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.data.documents import Document
from sparsejax.data.store import cached_stores, store_in_memory, token_dtype
from sparsejax.data.tokenizers import ByteTokenizer


@dataclasses.dataclass
class Fruit:
    """A source that counts how often it is read."""

    texts: tuple[str, ...] = ("apple", "", "fig", "größe")
    name: str = "fruit"
    hash: str = "0123456789abcdef" * 4
    domains: tuple[str, ...] = ("even", "odd")
    python: Optional[str] = None
    reads: int = 0

    def documents(self, split):
        self.reads += 1
        yield from (Document(text, n % 2) for n, text in enumerate(self.texts if split == "train" else ()))


def test_stores_hold_the_documents(tmp_path):
    source = Fruit()
    stores = cached_stores(source, ByteTokenizer(), tmp_path)
    for store in (stores["train"], store_in_memory(source.documents("train"), ByteTokenizer())):
        assert store.tokens.tobytes().decode() == "applefiggröße" and store.tokens.dtype == np.uint8
        assert (
            store.offsets.tolist() == [0, 5, 8, 15] and store.offsets.dtype == np.int64
        )  # the empty document is left out
        assert store.domains.tolist() == [0, 0, 1] and store.domains.dtype == np.int32
        assert store.num_bytes == 15
    assert len(stores["validation"].tokens) == 0 and stores["validation"].offsets.tolist() == [0]


def test_the_cache_is_used_and_told_apart_by_hash_and_tokenizer(tmp_path):
    source, tokenizer = Fruit(), ByteTokenizer()
    for _ in range(3):
        cached_stores(source, tokenizer, tmp_path)
    assert source.reads == 2
    tokenizer.fingerprint = "another"
    cached_stores(source, tokenizer, tmp_path)
    assert source.reads == 4
    cached_stores(dataclasses.replace(source, hash="f" * 64, texts=("kiwi",)), tokenizer, tmp_path)
    assert cached_stores(source, tokenizer, tmp_path)["train"].tokens.tobytes().startswith(b"apple")


def test_ids_take_the_smallest_type():
    sizes = [2, 256, 257, 65536, 65537]
    assert [token_dtype(size).name for size in sizes] == ["uint8", "uint8", "uint16", "uint16", "uint32"]


def edit_info(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("train.tokens.bin", lambda path: path.write_bytes(b"x" + path.read_bytes()[1:])),
        ("train.offsets.bin", lambda path: path.write_bytes(path.read_bytes()[::-1])),
        ("train.domains.bin", lambda path: path.unlink()),
        ("info.json", lambda path: path.unlink()),
        ("info.json", lambda path: path.write_text("{")),
        ("info.json", lambda path: path.write_text("[]")),
        ("info.json", lambda path: edit_info(path, format=0)),
        ("info.json", lambda path: edit_info(path, splits={})),
        ("info.json", lambda path: edit_info(path, splits={"train": {"tokens": {}}})),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path, name, damage):
    cached_stores(Fruit(), ByteTokenizer(), tmp_path)
    (path,) = tmp_path.rglob(name)
    damage(path)
    source = Fruit()
    assert cached_stores(source, ByteTokenizer(), tmp_path)["train"].tokens.tobytes().decode() == "applefiggröße"
    assert source.reads == 2


def test_what_a_killed_build_left_is_no_hindrance(tmp_path):
    partial = tmp_path / "tokens" / "0123456789abcdef-bytes.partial"
    partial.mkdir(parents=True)
    (partial / "train.tokens.bin").write_bytes(b"half")
    assert len(cached_stores(Fruit(), ByteTokenizer(), tmp_path)["train"].tokens) == 15
    assert not partial.exists()


def test_an_error_in_the_source_leaves_nothing(tmp_path):
    class Rotten(Fruit):
        def documents(self, split):
            yield Document("good", 0)
            raise ConfigError("data.path", "rotten")

    with pytest.raises(ConfigError, match="rotten"):
        cached_stores(Rotten(), ByteTokenizer(), tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] in ([], [".lock"])


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data.cache: cannot write .*Not a directory"):
        cached_stores(Fruit(), ByteTokenizer(), tmp_path / "file" / "cache")


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import ByteTokenizer, Fruit, cached_stores

class Slow(Fruit):
    def documents(self, split):
        with open({str(tmp_path / "log")!r}, "a") as log:
            log.write(f"{{split}}\\n")
        time.sleep(0.5)
        yield from super().documents(split)

assert len(cached_stores(Slow(), ByteTokenizer(), __import__("pathlib").Path({str(tmp_path)!r}))["train"].tokens) == 15
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    assert (tmp_path / "log").read_text().split() == ["train", "validation"]
