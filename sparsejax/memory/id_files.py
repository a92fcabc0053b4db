"""Files that hold a number for every id of the vocabulary."""

import functools
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sparsejax.base.errors import ConfigError


@functools.lru_cache(maxsize=4)
def numbers_of_ids(key: str, path: str) -> Int[np.ndarray, " V"]:
    """The numbers of the file that the config's `key` names, int32; `ConfigError` if there are none such."""
    wanted = "wanted is a .npy file of [V] integers ≥ 0"
    try:
        ids = np.load(Path(path).expanduser())
    except OSError as error:
        raise ConfigError(key, f"{path!r} could not be read ({error.strerror or error}); {wanted}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise ConfigError(key, f"{path!r} is no array; {wanted}") from None
    if (
        not isinstance(ids, np.ndarray)
        or ids.ndim != 1
        or ids.dtype.kind not in "iu"
        or not ids.size
        or ids.min() < 0
        or ids.max() >= 2**31
    ):
        raise ConfigError(key, f"{path!r} holds something else; {wanted}")
    return ids.astype(np.int32)


def check_ids(key: str, path: str, vocab_size: int) -> None:
    """Raises `ConfigError` unless the file has a number for every id."""
    count = len(numbers_of_ids(key, path))
    if count != vocab_size:
        raise ConfigError(key, f"{path!r} has {count} ids, the vocabulary {vocab_size}")
