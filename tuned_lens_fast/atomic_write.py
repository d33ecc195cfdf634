"""Files are written aside and renamed when they are whole and on the disk, so that none is ever half there."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Bytes of a file's name at most, on nearly all file systems.
_LONGEST_NAME = 255


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden name beside ``path`` to write to, renamed to ``path`` when the block ends well.

    A killed process may leave the hidden file; it ends in neither ``path``'s suffix nor any other that readers of
    a folder look for.
    """
    path = Path(path)
    aside = aside_of(path)
    try:
        yield aside
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """The hidden name beside ``path``, of this process alone."""
    name, mark = path.name, f".{machine()}-{os.getpid()}"
    while len(os.fsencode(f".{name}{mark}")) > _LONGEST_NAME:
        name = name[:-1]
    return path.with_name(f".{name}{mark}")


def machine() -> str:
    """Eight letters of this machine's name, hashed."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a file that is whole to ``path``, once it is on the disk."""
    # Without this a loss of power may keep the new name and lose what it names.
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power."""
    if os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
