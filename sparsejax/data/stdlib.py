"""The embedded corpus: the source of the standard library of the Python that runs this.

Every interpreter carries it, so a first training run needs no download. It differs between Python versions, therefore its hash
and the version are part of a run's record.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Optional

import filelock

from sparsejax.base.errors import ConfigError
from sparsejax.data.documents import Document, Split

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
VALIDATION_FRACTION = 0.05


def stdlib_files(root: Path) -> list[str]:
    """The corpus's `*.py` below `root` as sorted POSIX paths relative to it."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED and not name.startswith("config-")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def read_source(path: Path) -> str:
    """A file's text; bytes that are not UTF-8 (a few old codings) become U+FFFD, so that every file counts."""
    return path.read_bytes().decode("utf-8", errors="replace")


def domain_of(path: str) -> str:
    """The top-level package or module: 'json/decoder.py' and 'json/tool.py' -> 'json', 'abc.py' -> 'abc'."""
    return path.split("/")[0].removesuffix(".py")


def split_of(path: str) -> Split:
    """By a hash of the path: a file stays in its split when others come or go."""
    draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < VALIDATION_FRACTION else "train"


@dataclasses.dataclass(frozen=True)
class StdlibSource:
    """`root` is the library's folder; `folder` holds the TFDS dataset made from it, one per corpus hash."""

    root: Path
    folder: Path
    name: str = "stdlib"
    python: Optional[str] = platform.python_version()

    def __post_init__(self):
        if not self._files:
            raise ConfigError("data.name", f"'stdlib' found no *.py below {self.root}; use another corpus")

    @classmethod
    def installed(cls, folder: Path) -> "StdlibSource":
        return cls(Path(sysconfig.get_path("stdlib")), folder)

    @functools.cached_property
    def _files(self) -> list[str]:
        return stdlib_files(self.root)

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({domain_of(path) for path in self._files}))

    @functools.cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            content = (self.root / path).read_bytes()
            digest.update(f"{path}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """In path order. Prepares the TFDS dataset first when the folder does not hold it, or holds a damaged one."""
        for example in self._examples(split):
            yield Document(text=example["text"].decode(), domain=int(example["domain"]))

    def _examples(self, split: Split) -> Any:
        expected = [path for path in self._files if split_of(path) == split]
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / f"{self.hash[:16]}.lock"):
            for fresh in (False, True):
                if fresh:
                    shutil.rmtree(self.folder / self.hash[:16], ignore_errors=True)
                try:
                    source = self._prepared(split)
                    if [example["path"].decode() for example in source] == expected:
                        return source
                except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:  # a truncated or mixed-up folder
                    if fresh:
                        raise ConfigError("data.cache", f"cannot build the corpus in {self.folder}: {error}") from error
        raise ConfigError("data.name", f"the files below {self.root} changed while they were read; try again")

    def _prepared(self, split: Split) -> Any:
        from sparsejax.data.stdlib_text import stdlib_text_dataset_builder as stdlib_text

        with _quiet_tfds():
            builder = stdlib_text.Builder(
                data_dir=self.folder / self.hash[:16],
                config=stdlib_text.FolderConfig(name=f"python-{self.python}", root=str(self.root)),
                file_format="array_record",
            )
            if set(builder.info.splits) != {name for name in ("train", "validation") if self._has(name)}:
                builder.download_and_prepare()
            return builder.as_data_source(split=split) if self._has(split) else []

    def _has(self, split: str) -> bool:
        return any(split_of(path) == split for path in self._files)


@contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS talks on stdout, which belongs to a command's result, and warns that a config given in code is 'custom'."""
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
