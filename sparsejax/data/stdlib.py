"""The embedded corpus: the source of the standard library of the Python that runs this.

Every interpreter carries it, so a first training run needs no download. It differs between Python versions, therefore
its hash and the version are part of a run's record.
"""

import hashlib
import io
import logging
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Optional

import filelock

from sparsejax.base.errors import ConfigError, RunError
from sparsejax.data.documents import Document, Split

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
VALIDATION_FRACTION = 0.05


def stdlib_files(root: Path) -> list[str]:
    """The corpus's `*.py` below `root` as sorted POSIX paths relative to it."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED and not name.startswith("config-")]
        paths = [Path(folder) / name for name in files if name.endswith(".py")]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]  # not: a link to nowhere
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


class StdlibSource:
    """`root` is the library's folder; `folder` holds the TFDS dataset made from it, one per corpus hash."""

    name: str = "stdlib"
    python: Optional[str] = platform.python_version()

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self._files = stdlib_files(root)
        if not self._files:
            raise ConfigError("data.name", f"'stdlib' found no *.py below {root}; use another corpus")
        self.domains = tuple(sorted({domain_of(path) for path in self._files}))
        self.hash = self._digest()

    @classmethod
    def installed(cls, folder: Path) -> "StdlibSource":
        return cls(Path(sysconfig.get_path("stdlib")), folder)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            content = (self.root / path).read_bytes()
            digest.update(f"{path}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        """In path order, from the TFDS dataset in `folder`, which is prepared first if it is missing or damaged."""
        for example in self._examples(split):
            yield Document(text=example["text"].decode(), domain=int(example["domain"]))

    def _examples(self, split: Split) -> list[dict[str, Any]]:
        place = self.folder / self.hash[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            try:
                return self._read(place, split)
            except Exception:
                shutil.rmtree(place, ignore_errors=True)
                return self._read(place, split)

    def _read(self, place: Path, split: Split) -> list[dict[str, Any]]:
        from sparsejax.data.stdlib_text import stdlib_text_dataset_builder as stdlib_text

        with _quiet_tfds():
            config = stdlib_text.FolderConfig(name=f"python-{self.python}", root=str(self.root))
            builder: Any = stdlib_text.Builder(data_dir=place, config=config, file_format="array_record")
            builder.download_and_prepare()
            examples = list(builder.as_data_source(split)) if split in builder.info.splits else []
        paths = [path for path in self._files if split_of(path) == split]
        if [example["path"].decode() for example in examples] != paths:  # a truncated file reads as empty examples
            raise RunError(f"the dataset in {place} does not hold the files below {self.root}")
        return examples


@contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS tells stdout of a download that is none, and warns that a config given in code is 'custom'."""
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
