"""Local files: how they split, and what is wrong with those that are refused."""

import json

import pytest

from sparsejax.base.errors import ConfigError
from sparsejax.data.config import DataConfig
from sparsejax.data.corpus import open_corpus
from sparsejax.data.local_text import LocalSource, split_bytes


def opened(tmp_path, path, **settings):
    return open_corpus(
        DataConfig(name="text", path=str(path), cache=str(tmp_path / "cache"), sequence_length=4, **settings)
    )


def test_a_text_is_split_as_nanogpt_splits_it(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(997))
    (tmp_path / "input.txt").write_text(text)
    corpus = opened(tmp_path, tmp_path / "input.txt", validation_fraction=0.1)
    n = len(text)
    assert corpus.train.tokens.tobytes().decode() == text[: int(n * 0.9)]
    assert corpus.validation.tokens.tobytes().decode() == text[int(n * 0.9) :]
    assert corpus.info.domains == ("input.txt",) and corpus.info.train.documents == 1


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.77, 0.999])
def test_a_split_never_cuts_a_character(fraction):
    text = "aé日\U0001f600" * 7
    train, validation = split_bytes(text.encode(), fraction)
    assert train.decode() + validation.decode() == text
    assert 0 <= int(len(text.encode()) * (1 - fraction)) - len(train) < 4


def test_lines_of_json_are_documents(tmp_path):
    rows = [{"body": f"document {n}", "id": n} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = LocalSource(str(tmp_path / "a.jsonl"), "body", 0.2)
    assert [document.text for document in source.documents("train")] == [row["body"] for row in rows[:8]]
    assert [document.text for document in source.documents("validation")] == [row["body"] for row in rows[8:]]


def test_a_glob_gives_a_domain_per_file_and_splits_each(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b" * 100)
    (tmp_path / "sub" / "a.txt").write_text("a" * 50)
    corpus = opened(tmp_path, tmp_path / "**" / "*.txt", validation_fraction=0.1)
    assert corpus.info.domains == ("b.txt", "sub/a.txt")
    assert corpus.train.tokens.tobytes() == b"b" * 90 + b"a" * 45 and corpus.train.domains.tolist() == [0, 1]
    assert corpus.validation.tokens.tobytes() == b"b" * 10 + b"a" * 5


def test_the_hash_follows_the_text_and_not_the_place(tmp_path):
    for folder, text in (("x", "same text"), ("y", "same text"), ("z", "other text")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    x, y, z = (LocalSource(str(tmp_path / folder / "a.txt"), "text", 0.1).hash for folder in "xyz")
    assert x == y != z
    assert LocalSource(str(tmp_path / "x" / "a.txt"), "text", 0.2).hash != x


GOOD = '{"text": "a line of text that is long enough"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "is no file and matches none"),
        ("*.txt", None, "is no file and matches none"),
        ("a.md", b"text", "neither .txt"),
        ("a.txt", b"", "has 0 training tokens; a row takes 5"),
        ("a.txt", b"abcd", "training tokens; a row takes 5"),
        ("a.txt", b"abc\xff and so on", "is not UTF-8 .byte 0xff"),
        ("a.jsonl", GOOD.encode() + b"{oops\n" + GOOD.encode() * 30, "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n' * 9, "line 1 has no key 'text' .data.text_feature.; it has: txt"),
        ("a.jsonl", b"[1]\n" * 9, "line 1 has no key 'text' .data.text_feature.; it has: list"),
        ("a.jsonl", b'{"text": 3}\n' * 9, "line 1: 'text' is not a string"),
        ("a.jsonl", b"\xff\n" * 9, "line 1 is not JSON"),
        ("a.jsonl", b"\n\n", "has 0 training tokens"),
    ],
)
def test_bad_files_are_one_line_errors_and_leave_no_cache(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        opened(tmp_path, tmp_path / name)
    assert error.value.key == "data.path" and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_folder_is_refused_with_a_glob_to_use(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder; give a file, or a glob such as '.*/a.txt/\*.txt'"):
        opened(tmp_path, tmp_path / "a.txt")
