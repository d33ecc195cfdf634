"""Who works on what in a run's folder: locks on single bytes of one file, which a process that dies lets go of.

Beside ``parts``, at the end of the way from hidden state to statistics. Processes need not know of each other: that
they see the same folder is enough, whatever started them, on one machine or on many.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tuned_lens_fast.data.folder import LOCK, cannot_write, held

try:
    import fcntl
except ImportError:  # Windows, where bytes cannot be locked by several readers
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
#: Bytes of the file: the first is held by who reads or writes the manifest, the second is shared by all who are at
#: work, and those from the third on belong to one share each.
_GUARD, _AT_WORK, _SHARES = range(3)
#: What is written to the byte of a share whose parts were written, or compared with their checksums, by one of those
#: who are at work.
_CHECKED = b"\x01"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: Seconds from one look at what others hold to the next: at first, and at most.
_SOONEST, _LATEST = 0.02, 2.0


class Claims:
    """The shares of a run that this process holds, and what those at work know of all; a context manager.

    Where the file system has no locks, a process takes the shares whose number is its ``RANK`` modulo ``WORLD_SIZE``,
    with a warning, and on Windows one process at a time is let in.
    """

    def __init__(self, path: Path, ranks: int = 1) -> None:
        """``ranks`` processes work as one, of which this is the first."""
        self._path, self._ranks = path, ranks
        self._file = -1
        self._closing = ExitStack()
        self.rank, self.of = 0, 1  #: shares are taken by number, which of how many

    def __enter__(self) -> Claims:
        if fcntl is None:
            self._closing.enter_context(held(self._path))
            return self
        try:
            self._file = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._closing.callback(os.close, self._file)
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()
        self._file = -1

    @property
    def locked(self) -> bool:
        """Whether locks tell who holds what."""
        return self._file >= 0

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the manifest within the block; the first of those at work forgets what others checked before."""
        if self.locked:
            try:
                for _ in looks(f"another process to let go of the manifest of {self._path}"):
                    if self._lock(_GUARD):
                        break
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise cannot_write(self._path, error) from error
                self._do_without()
        if not self.locked:
            yield
            return
        try:
            if self._lock(_AT_WORK):
                os.truncate(self._file, 0)
            self._lock(_AT_WORK, shared=True)
            yield
        finally:
            self.release(_GUARD - _SHARES)

    def _do_without(self) -> None:
        self._closing.close()
        self._file = -1
        told = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", self._ranks)))
        self.rank, self.of = (number // self._ranks for number in told)
        writes = "nothing else writes there"
        if self.of > 1:
            writes = f"only the {self.of} processes of this job write there, of which each takes its own share"
        warnings.warn(f"out: the file system of {self._path} has no locks; see that {writes}", stacklevel=2)

    def claim(self, share: int) -> bool:
        """Whether the share is this process's from now on."""
        return self._lock(_SHARES + share) if self.locked else share % self.of == self.rank

    def release(self, share: int) -> None:
        """Let go of it."""
        if self.locked:
            _set_lock(self._file, fcntl.F_UNLCK, _SHARES + share)

    def checked(self, share: int) -> bool:
        """Whether one of those at work knows that the share's parts are whole, or were."""
        return self.locked and os.pread(self._file, 1, _SHARES + share) == _CHECKED

    def mark(self, share: int) -> None:
        """Say so; the share is held."""
        if self.locked:
            with suppress(OSError):  # on a full disk; then others will check it again
                os.pwrite(self._file, _CHECKED, _SHARES + share)

    def _lock(self, at: int, shared: bool = False) -> bool:
        """Whether the byte is locked now; False where another process has it."""
        try:
            _set_lock(self._file, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, at)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True


def looks(what: str) -> Iterator[float]:
    """Now, and again after longer and longer waits; the log says once in a while what is waited for."""
    start, wait, told = time.monotonic(), _SOONEST, 0.0
    while True:
        yield wait
        time.sleep(wait)
        wait = min(1.5 * wait, _LATEST)
        waited = time.monotonic() - start
        if waited > 2 * told + _LATEST:
            told = waited
            _log.info("waiting for %s, %.0f s so far", what, waited)


def _set_lock(file: int, kind: int, at: int) -> None:
    """Lock or unlock one byte, without waiting."""
    if sys.platform == "linux":  # macOS has such locks too, but its structure has another layout
        # The open file's own, so that two threads exclude each other and another close() lets go of nothing.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, at, 1, 0))
        return
    flags = {fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_RDLCK: fcntl.LOCK_SH}.get(kind)
    fcntl.lockf(file, fcntl.LOCK_UN if flags is None else flags | fcntl.LOCK_NB, 1, at)
