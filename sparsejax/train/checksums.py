"""Sizes and checksums of the files of a folder, to tell a whole checkpoint from a truncated, edited or half-copied one.

Orbax reports a truncated array, but restores one with a flipped bit without a word.
"""

import json
import os
import zlib
from pathlib import Path

CHECKSUMS = "checksums.json"
CHECKED_BYTES = 64 * 2**30
"""Checkpoints up to this size are read again, by one process, to check their contents; of larger ones only sizes are
kept and compared, for that would take many minutes of every save and restart."""


def write_checksums(folder: Path) -> None:
    """Writes size and CRC-32 (null beyond `CHECKED_BYTES`) of every file in the folders below `folder` into its
    `checksums.json`.

    Files at the top of `folder` are left out: orbax rewrites its bookkeeping there until the very end.
    """
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sizes = {path: path.stat().st_size for path in files}
    read = sum(sizes.values()) <= CHECKED_BYTES
    sums = {
        str(path.relative_to(folder)): {"bytes": size, "crc32": _crc32(path) if read else None}
        for path, size in sizes.items()
    }
    with (folder / CHECKSUMS).open("w") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str:
    """What is wrong with the files of `folder`: a clause that names the first bad file, '' when nothing is."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name, want in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != want["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {want['bytes']}"
            if want["crc32"] is not None and _crc32(path) != want["crc32"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} is garbled"
    return "" if sums else f"{CHECKSUMS} is empty"


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
