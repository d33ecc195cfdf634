"""What every folder has that a run writes to: one process at a time, and an identity by which another run is refused.

It stands at the end of the way from hidden state to statistics, below ``parts``, and below training's checkpoints.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = "_lock"


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of what is ready for JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any], names: dict[str, str]) -> None:
    """Refuse a folder whose ``manifest`` has another identity; ``names`` are what people call hashes in it.

    Raises:
        ValueError: it names what differs.
    """
    there, here = manifest["identity"], json.loads(json.dumps(identity))
    differ = []
    for key in here | there:
        if there.get(key) == here.get(key):
            continue
        old, new = (
            (name or value)
            for name, value in ((manifest["names"].get(key), there.get(key)), (names.get(key), here.get(key)))
        )
        is_hash = isinstance(old, str) and re.fullmatch("[0-9a-f]{64}", old)
        what = "" if old == new or is_hash else f" ({_short(old)} there, {_short(new)} here)"
        differ.append(_short(key) + what)
    if differ:
        raise ValueError(
            f"out: {path} holds a run with another {', another '.join(differ[:3])}; name another folder, or delete "
            f"that one"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the folder within the block; the system lets go of it for a process that dies."""
    # A lock that is only a file's existence would outlast a process that is killed.
    lock = FileLock(path / LOCK, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"out: another process is writing to {path}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise cannot_write(path, error) from error
        warnings.warn(f"out: the file system of {path} has no locks; see that nothing else writes there", stacklevel=2)
    try:
        yield
    finally:
        lock.release()


def cannot_write(path: Path, error: OSError) -> OSError:
    """``error`` with the path and what ails it, as one sentence."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    failure = OSError(f"out: cannot write {path}: {reason}")
    failure.errno = error.errno
    return failure
