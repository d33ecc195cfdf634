"""The Parquet data set on disk: a folder, a manifest, and parts that are whole or not there.

It ends the way from hidden state to statistics where they are too many to keep: ``dataset`` says what is computed,
this module what of it is already on disk, and adds the rest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuned_lens_fast.atomic_write import atomic_write, sync_folder
from tuned_lens_fast.data.table import float_encodings, table_of
from tuned_lens_fast.stats import LensStats

if TYPE_CHECKING:
    import pyarrow as pa

# Readers of a folder of Parquet pass over names that begin so.
MANIFEST = "_run.json"
_LOCK = "_lock"
_FORMAT = "tuned_lens_fast data set 1"
#: The key of every part's metadata, which is JSON: the run, the model, the lens, the versions.
METADATA = b"tuned_lens_fast"
_PART = re.compile(r"part-\d{6}-\d{6}\.parquet")
_LEFTOVER = re.compile(rf"\.({re.escape(MANIFEST)}|{_PART.pattern})\.\d+")
#: Rows a row group holds at least, in whole layers: fewer cost more to write than reading past them does (1,024
#: positions of 31 layers take 180 ms with a group a layer, 100 ms with groups of 4,096 rows, 60 ms with one group).
_GROUP_ROWS = 4096
_IDS = ("document", "layer", "token_id", "token", "target")


@dataclass(frozen=True)
class Batch:
    """Documents that run through the model together, and how their positions are cut into chunks."""

    documents: list[int]  #: indices into the run's documents
    boundaries: list[int]  #: chunk i holds the positions from boundaries[i] to boundaries[i + 1]
    rows: list[int]  #: of every chunk's part


class RunFolder:
    """One run's folder, as long as this process holds it; see :func:`run_folder`."""

    def __init__(self, path: Path, batches: list[Batch], metadata: dict[str, Any]) -> None:
        self.path = path
        self.batches = batches
        self._metadata = metadata
        self._check_names()

    def unfinished(self) -> list[set[int]]:
        """For every batch the chunks whose part is not there, or not whole.

        Raises:
            ValueError: a part of another run.
        """
        return [
            {chunk for chunk in range(len(batch.rows)) if not self._is_whole(number, chunk)}
            for number, batch in enumerate(self.batches)
        ]

    def write(
        self,
        batch: int,
        chunk: int,
        stats: LensStats,
        documents: pa.Array,
        positions: Tensor,
        token_ids: Tensor,
        real: Tensor,
        tokenizer: Any,
    ) -> None:
        """Put a chunk on the disk as a part; see :func:`~tuned_lens_fast.data.table.table_of`.

        Raises:
            OSError: it cannot be written; nothing of it stays.
        """
        import pyarrow.parquet as pq

        table = table_of(stats, documents, positions, token_ids, real, tokenizer)
        path = self._part(batch, chunk)
        of_layer = max(1, int(real.sum()))
        metadata = {**self._metadata, "batch": batch, "chunk": chunk}
        try:
            with atomic_write(path) as aside:
                pq.write_table(
                    table.replace_schema_metadata({METADATA: json.dumps(metadata)}),
                    aside,
                    row_group_size=of_layer * -(-_GROUP_ROWS // of_layer),
                    compression="zstd",
                    use_dictionary=[name for name in _IDS if name in table.column_names],
                    column_encoding=float_encodings(table.schema),
                )
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _part(self, batch: int, chunk: int) -> Path:
        return self.path / f"part-{batch:06}-{chunk:06}.parquet"

    def _is_whole(self, batch: int, chunk: int) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._part(batch, chunk)
        try:
            found = pq.read_metadata(path)
        except FileNotFoundError:
            return False
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None):
                raise  # a disk or a right that fails says nothing about what is in the file
            return False
        made = json.loads((found.metadata or {}).get(METADATA, b"{}"))
        if made.get("run") != self._metadata["run"]:
            raise ValueError(f"out: {path} is a part of another run; name another folder, or move it away")
        return found.num_rows == self.batches[batch].rows[chunk]

    def _check_names(self) -> None:
        """Refuse what a reader would take for a part of this run; remove what killed processes left."""
        parts = {
            self._part(number, chunk).name
            for number, batch in enumerate(self.batches)
            for chunk in range(len(batch.rows))
        }
        _check_strangers(self.path, parts)
        for name in os.listdir(self.path):
            if _LEFTOVER.fullmatch(name):
                (self.path / name).unlink()


@contextmanager
def run_folder(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    names: dict[str, str],
    made_with: dict[str, str],
    plan: Callable[[], list[Batch]],
) -> Iterator[RunFolder]:
    """The folder ``path`` for one run: a new one, or one that an earlier process left unfinished.

    Args:
        path: made if it is not there.
        identity: all that the rows depend on, ready for JSON; a folder with another identity is refused.
        names: what people call some entries of ``identity`` that are only hashes there.
        made_with: versions and the like, recorded and not compared.
        plan: called for a new run; an earlier one's batches are kept.

    Raises:
        ValueError: the folder is another run's, holds other things, or has a damaged manifest.
        BlockingIOError: another process is writing there.
        OSError: the folder cannot be made or written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"out: {path} is a file, wanted a folder")
    # Not for a folder that has a plan: it may have been made with more memory than there is now.
    batches = None
    if not (path / MANIFEST).exists():
        if path.exists():
            _check_strangers(path, set())
        batches = plan()
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
        lock = open(path / _LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise _cannot_write(path, error) from error
    with lock:
        _lock(lock.fileno(), path)
        if batches is not None and not (path / MANIFEST).exists():
            _write_manifest(path, identity, names, made_with, batches)
        manifest = _read_manifest(path)
        _check_identity(path, manifest, identity, names)
        metadata = {"run": manifest["run"], **names, "watch": identity.get("watch"), **made_with}
        yield RunFolder(path, [Batch(**batch) for batch in manifest["batches"]], metadata)


def recorded_engine(path: str | os.PathLike[str]) -> str | None:
    """The engine of the run in the folder, as far as it can be read."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["identity"]["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_manifest(
    path: Path, identity: dict[str, Any], names: dict[str, str], made_with: dict[str, str], batches: list[Batch]
) -> None:
    body = {
        "format": _FORMAT,
        "names": names,
        "identity": identity,
        "made_with": made_with,
        "batches": [asdict(batch) for batch in batches],
    }
    try:
        with atomic_write(path / MANIFEST) as aside:
            aside.write_text(json.dumps({"run": _digest(body), **body}, indent=1), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path / MANIFEST, error) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(
                f"out: {path / MANIFEST} has the format {manifest['format']!r}, this version writes {_FORMAT!r}; "
                f"name another folder"
            )
        if manifest["run"] == _digest({key: value for key, value in manifest.items() if key != "run"}):
            return manifest
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise ValueError(
        f"out: {path / MANIFEST} is damaged, so that the run cannot be resumed; its parts can still be read. Name "
        f"another folder, or delete this one"
    )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any], names: dict[str, str]) -> None:
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
        differ.append(key if old == new or is_hash else f"{key} ({old} there, {new} here)")
    if differ:
        raise ValueError(
            f"out: {path} holds a run with another {', another '.join(differ)}; name another folder, or delete that one"
        )


def _check_strangers(path: Path, parts: set[str]) -> None:
    """Refuse a folder that holds, besides ``parts``, what readers of the data set would see."""
    strangers = sorted(name for name in os.listdir(path) if not name.startswith((".", "_")) and name not in parts)
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ValueError(
            f"out: {path} holds {strangers[0]}{more}, no part of this run; wanted a folder of its own: name a new one"
        )


def _lock(handle: int, path: Path) -> None:
    """Hold the folder until the file is closed, which the system does for a process that dies."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            warnings.warn(
                f"out: the file system of {path} has no locks; see that nothing else writes there", stacklevel=2
            )
            return
        raise BlockingIOError(f"out: another process is writing to {path}") from error


def _cannot_write(path: Path, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    failure = OSError(f"out: cannot write {path}: {reason}")
    failure.errno = error.errno
    return failure
