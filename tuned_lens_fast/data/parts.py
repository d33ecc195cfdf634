"""The Parquet data set on disk: a folder, a manifest, and parts that are whole or not there.

It ends the way from hidden state to statistics where they are too many to keep: ``dataset`` says what is computed,
this module what of it is already on disk, and adds the rest. A part has the checksum of its content in its name, so
that one rename puts both there, and damage is noticed whenever the content is read. Any number of processes work on
one run, each on shares that it has claimed (``claims``).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuned_lens_fast.atomic_write import aside_of, atomic_write, machine, put_in_place, sync_folder
from tuned_lens_fast.conditions import warn_of_changes
from tuned_lens_fast.data.claims import Claims, looks
from tuned_lens_fast.data.folder import cannot_write, check_identity, digest
from tuned_lens_fast.data.table import float_encodings

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset

# Readers of a folder of Parquet pass over names that begin so.
MANIFEST = "_run.json"
_FORMAT = "tuned_lens_fast data set 3"
_ANY_FORMAT = re.compile(r"tuned_lens_fast data set \d{1,9}")
#: Bytes of a manifest at most: several million documents.
_LARGEST_MANIFEST = 2**30
#: The key of every part's metadata, which is JSON: the run, the model, the lens, the versions.
METADATA = b"tuned_lens_fast"
_PART = re.compile(r"part-(\d{6,9})-(\d{6,9})-([0-9a-f]{16})\.parquet")
_LEFTOVER = re.compile(rf"\.(?:{re.escape(MANIFEST)}|part-(\d{{6,9}})-\d{{6,9}}\.parquet)\.([0-9a-f]{{8}})-\d+")
#: Seconds after which nobody is at work on a file that was begun on another machine, whose locks may not be seen here.
_ABANDONED = 3600
#: Rows a row group holds at least, in whole layers: fewer cost more to write than reading past them does (1,024
#: positions of 31 layers take 180 ms with a group a layer, 100 ms with groups of 4,096 rows, 60 ms with one group).
_GROUP_ROWS = 4096
_IDS = ("document", "layer", "token_id", "token", "target")


@dataclass(frozen=True)
class Batch:
    """Documents that run through the model together, and how their positions are cut into chunks."""

    documents: list[int]  #: indices into the run's documents
    boundaries: list[int]  #: chunk i holds the positions from boundaries[i - 1] to boundaries[i]


@dataclass(frozen=True)
class Share:
    """What one process decodes at a time: some batches, whose chunks are written to some parts."""

    batches: list[Batch]
    ends: list[int]  #: part i holds the chunks, counted through all batches, from ends[i - 1] to ends[i]
    rows: list[int]  #: of every part


@dataclass(frozen=True)
class RunState:
    """What of a run is on disk. ``str(state)`` says it in a line."""

    path: Path
    shares: list[Share]
    whole: dict[tuple[int, int], Path]  #: by share and number, the parts whose content is what was written
    damaged: dict[tuple[int, int], Path]  #: the other parts
    doubled: list[Path] = field(default_factory=list)  #: whole or not, more than one for their place

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Share and number of the parts that are not there at all."""
        there = self.whole.keys() | self.damaged.keys()
        return [place for place in _places(self.shares) if place not in there]

    @property
    def complete(self) -> bool:
        """Whether every part is there once, and whole."""
        return len(self.whole) == len(_places(self.shares)) and not self.doubled

    def __str__(self) -> str:
        parts = len(_places(self.shares))
        documents = sum(len(batch.documents) for share in self.shares for batch in share.batches)
        held = f"{parts:,}" if self.complete else f"{len(self.whole):,} of {parts:,}"
        lacks = [f"{kind} {_named(names)}" for kind, names in (
            ("damaged:", [path.name for path in self.damaged.values()]),
            ("there twice:", [path.name for path in self.doubled]),
            ("missing:", [_stem(*place) for place in self.missing]),
        ) if names]  # fmt: skip
        return f"{self.path}: {held} parts, {documents:,} documents, {'; '.join(lacks) or 'complete'}"


class RunFolder:
    """One run's folder, which others may be writing to as well; see :func:`run_folder`."""

    def __init__(
        self,
        path: Path,
        shares: list[Share],
        metadata: dict[str, Any],
        conditions: tuple[dict[str, Any], dict[str, Any]],
        claims: Claims,
    ) -> None:
        self.path = path
        self.shares = shares
        self._metadata = metadata
        self._conditions = conditions  # under which the run began, and goes on
        self._warned = False
        self._claims = claims
        self._there = _parts(path, shares, "out")

    def warn_of_changes(self, stacklevel: int) -> None:
        """Warn, once, where the run began under other conditions than it goes on with."""
        if not self._warned:
            self._warned = True
            warn_of_changes(*self._conditions, "decoded", stacklevel)

    def has(self, share: int, part: int) -> bool:
        """Whether a file of that part was there at the last look."""
        return (share, part) in self._there

    def has_all(self, share: int) -> bool:
        """Whether files of all of a share's parts were."""
        return all(self.has(share, part) for part in range(len(self.shares[share].rows)))

    def claimed(self) -> Iterator[tuple[int, list[int]]]:
        """Every share that this process has claimed, and the numbers of its parts that are to be written.

        Parts that are damaged, or there twice, are removed, with a warning. :meth:`finish` lets go of a share. It ends
        when all parts are there, whoever wrote them: what another process holds is waited for, and taken over from one
        that dies.

        Raises:
            ValueError: a part of another run.
            OSError: a part cannot be read, or not removed.
        """
        left, waits = [*range(len(self.shares))], None
        while left:
            held = []
            for share in left:
                if self._claims.checked(share) and self.has_all(share):
                    continue
                if not self._claims.claim(share):
                    held.append(share)
                    continue
                lacking = self._lacking(share)
                if lacking:
                    waits = None
                    yield share, lacking
                else:
                    self.finish(share)
            if not self._claims.locked:
                return
            if held:
                names = _named([f"{share:06}" for share in held])
                waits = waits or looks(f"the shares {names} of {self.path}, which other processes hold")
                next(waits)
                self._there = _parts(self.path, self.shares, "out")
            left = held

    def finish(self, share: int) -> None:
        """All of a share's parts are there: let go of it."""
        self._claims.mark(share)
        self._claims.release(share)

    def _lacking(self, share: int) -> list[int]:
        """The parts that a share lacks, which this process holds; what a dead one left of it is removed."""
        _remove_leftovers(self.path, share)
        self._there = _parts(self.path, self.shares, "out")
        places = [(share, part) for part in range(len(self.shares[share].rows))]
        if self._claims.checked(share):
            return [part for share, part in places if (share, part) not in self._there]
        found = {place: self._there[place] for place in places if place in self._there}
        state = _survey(self.path, self.shares, found, self._metadata["run"], "out")
        surplus = [*state.damaged.values(), *state.doubled]
        if surplus:
            names = _named([path.name for path in surplus])
            what = "are damaged and are written anew" if state.damaged else "are there twice and are removed"
            warnings.warn(f"out: parts in {self.path} {what}: {names}", stacklevel=6)
        # Before the new ones are there: rows that differ in their last bits would get another name beside the old.
        for path in surplus:
            path.unlink(missing_ok=True)
        return [part for share, part in places if (share, part) not in state.whole]

    def begin(self, share: int, part: int) -> Part:
        """A part to be written, of a share that this process holds."""
        return Part(self.path, _stem(share, part), {**self._metadata, "share": share, "part": part})


class Part:
    """A part that is being written: chunk by chunk under another name, and renamed when it is whole.

    Its methods raise OSError where it cannot be written; nothing of it stays.
    """

    def __init__(self, folder: Path, stem: str, metadata: dict[str, Any]) -> None:
        self._folder = folder
        self._stem = stem
        self._metadata = {METADATA: json.dumps(metadata)}
        self._aside = aside_of(folder / f"{stem}.parquet")
        self._file: _Checked | None = None
        self._writer: Any = None

    def add(self, table: pa.Table, of_layer: int) -> None:
        """Write the rows of one chunk, of which a layer has ``of_layer``; see
        :func:`~tuned_lens_fast.data.table.table_of`.
        """
        import pyarrow.parquet as pq

        with self._removed_on_failure():
            if self._file is None:
                self._file = _Checked(self._aside)
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self._file,
                    table.schema.with_metadata(self._metadata),
                    compression="zstd",
                    use_dictionary=[name for name in _IDS if name in table.column_names],
                    column_encoding=float_encodings(table.schema),
                )
            of_layer = max(1, of_layer)
            rows = of_layer * -(-_GROUP_ROWS // of_layer)
            self._writer.write_table(table.replace_schema_metadata(self._metadata), rows)

    def abandon(self) -> None:
        """Remove what was written of it."""
        if self._file is not None:
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Put it in its place, under a name with its checksum."""
        assert self._file is not None
        with self._removed_on_failure():
            self._writer.close()
            self._file.close()
            put_in_place(self._aside, self._folder / f"{self._stem}-{_checksum(self._file.digest)}.parquet")

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                raise cannot_write(self._folder / f"{self._stem}.parquet", error) from error
            raise


class _Checked(io.FileIO):
    """A file that is written, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += super().write(view[done:]) or 0
        return done


@contextmanager
def run_folder(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    names: dict[str, str],
    made_with: dict[str, Any],
    plan: Callable[[], list[Share]],
    ranks: int = 1,
) -> Iterator[RunFolder]:
    """The folder ``path`` for one run: a new one, or one that others began and may be writing to.

    Args:
        path: made if it is not there.
        identity: all that the rows depend on, ready for JSON; a folder with another identity is refused.
        names: what people call some entries of ``identity`` that are only hashes there.
        made_with: versions and the like, on which the last bits of the rows may depend; recorded, and what differs can
            be warned of.
        plan: called for a new run; the shares of one that is there are kept.
        ranks: processes that work as one, of which this is the first.

    Raises:
        ValueError: the folder is another run's, holds other things, or has a damaged manifest.
        OSError: the folder cannot be made or written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"out: {path} is a file, wanted a folder")
    # Not for a folder that has a plan: it may have been made with more memory than there is now.
    shares = None
    if not (path / MANIFEST).exists():
        if path.exists():
            _parts(path, None, "out")
        shares = plan()
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    with Claims(path, ranks) as claims:
        with claims.guard():
            if shares is not None and not (path / MANIFEST).exists():
                if claims.rank:
                    for _ in looks(f"the first process of the job to write {path / MANIFEST}"):
                        if (path / MANIFEST).exists():
                            break
                else:
                    _write_manifest(path, identity, names, made_with, shares)
            manifest = _read_manifest(path, "out")
            check_identity(path, manifest, identity, names)
            _remove_leftovers(path, None)
        metadata = {"run": manifest["run"], **names, "watch": identity.get("watch"), **made_with}
        yield RunFolder(path, manifest["shares"], metadata, (manifest["made_with"], made_with), claims)


def check_run(path: str | os.PathLike[str]) -> RunState:
    """Read every part of a run and compare it with its checksum; nothing is changed.

    Raises:
        ValueError: the folder is no run's, has a damaged manifest, or holds what readers would take for a part.
        OSError: something there cannot be read.
        ImportError: pyarrow is not installed.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise ValueError(f"run: {path} holds no run, since there is no {MANIFEST}")
    manifest = _read_manifest(path, "run")
    return _survey(path, manifest["shares"], _parts(path, manifest["shares"], "run"), manifest["run"], "run")


def load_run(path: str | os.PathLike[str]) -> pyarrow.dataset.Dataset:
    """The rows of a run, of which every part was compared with its checksum; what is not whole is left out.

    A warning says which parts are missing or damaged, if any. The data set reads the parts when it is asked for rows:
    ``load_run(path).to_table(columns=["layer", "kl"])``. Columns: see
    :func:`~tuned_lens_fast.data.dataset.decode_documents`.

    Raises:
        ValueError, OSError, ImportError: as :func:`check_run`; also a run without a single whole part.
    """
    import pyarrow.dataset

    state = check_run(path)
    if not state.whole:
        raise ValueError(f"run: {state}")
    if not state.complete:
        warnings.warn(f"run: {state}; the call or command that made the run writes what is lost anew", stacklevel=2)
    return pyarrow.dataset.dataset([str(state.whole[place]) for place in sorted(state.whole)], format="parquet")


def recorded_engine(path: str | os.PathLike[str]) -> str | None:
    """The engine of the run in the folder, as far as it can be read."""
    try:
        return str(_read_manifest(Path(path), "out")["identity"]["engine"])
    except (OSError, ValueError, KeyError):
        return None


def _places(shares: list[Share]) -> list[tuple[int, int]]:
    """Share and number of every part."""
    return [(number, part) for number, share in enumerate(shares) for part in range(len(share.rows))]


def _stem(share: int, part: int) -> str:
    return f"part-{share:06}-{part:06}"


def _named(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _parts(path: Path, shares: list[Share] | None, argument: str) -> dict[tuple[int, int], list[Path]]:
    """The files of parts by share and number; refuses what else readers of the data set would see.

    One place has several where two processes wrote it on a file system whose locks hold on one machine only, and what
    they computed differs in its last bits.
    """
    found: dict[tuple[int, int], list[Path]] = {}
    strangers = []
    for name in sorted(os.listdir(path)):
        match = _PART.fullmatch(name)
        place = (int(match[1]), int(match[2])) if match else None
        if place and shares is not None and place[0] < len(shares) and place[1] < len(shares[place[0]].rows):
            found.setdefault(place, []).append(path / name)
        elif not name.startswith((".", "_")):
            strangers.append(name)
    if strangers:
        raise ValueError(
            f"{argument}: {path} holds {_named(strangers, 1)}, no part of this run; "
            f"wanted a folder of its own: {'name a new one' if argument == 'out' else 'move it away'}"
        )
    return found


def _remove_leftovers(path: Path, share: int | None) -> None:
    """Remove what dead processes were writing of a share, or of the manifest, which this process holds."""
    for name in os.listdir(path):
        leftover = _LEFTOVER.fullmatch(name)
        if leftover is None or share != (None if leftover[1] is None else int(leftover[1])):
            continue
        with suppress(FileNotFoundError):
            if leftover[2] == machine() or (path / name).stat().st_mtime < time.time() - _ABANDONED:
                (path / name).unlink()


def _survey(
    path: Path, shares: list[Share], there: dict[tuple[int, int], list[Path]], run: str, argument: str
) -> RunState:
    state = RunState(path, shares, {}, {})
    for place, files in there.items():
        # All readers of a place keep the same one of two.
        for part in files:
            if place in state.whole:
                state.doubled.append(part)
            elif _is_whole(part, place, run, argument):
                state.whole[place] = part
                state.doubled.extend(filter(None, [state.damaged.pop(place, None)]))
            elif place in state.damaged:
                state.doubled.append(part)
            else:
                state.damaged[place] = part
    return state


def _is_whole(part: Path, place: tuple[int, int], run: str, argument: str) -> bool:
    """Whether the file holds what was written to it, and for this place in the run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(part, "rb") as file:
        content = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            content.update(block)
        if not part.stem.endswith(_checksum(content)):
            return False
    try:
        made = json.loads(pq.read_metadata(part).metadata[METADATA])
        of, there = made["run"], (made["share"], made["part"])
    except (pa.ArrowException, ValueError, KeyError, TypeError):
        return False
    if of != run:
        raise ValueError(f"{argument}: {part} is a part of another run; name another folder, or move it away")
    return there == place


def _checksum(content: Any) -> str:
    """The first 64 bits of the SHA-256, which processors have instructions for."""
    return content.hexdigest()[:16]


def _write_manifest(
    path: Path, identity: dict[str, Any], names: dict[str, str], made_with: dict[str, Any], shares: list[Share]
) -> None:
    body = {
        "format": _FORMAT,
        "names": names,
        "identity": identity,
        "made_with": made_with,
        "shares": [asdict(share) for share in shares],
    }
    try:
        with atomic_write(path / MANIFEST) as aside:
            aside.write_text(json.dumps({"run": digest(body), **body}, indent=1), encoding="utf-8")
    except OSError as error:
        raise cannot_write(path / MANIFEST, error) from error


def _read_manifest(path: Path, argument: str) -> dict[str, Any]:
    """The manifest of the run in ``path``, its shares as :class:`Share`.

    Raises:
        ValueError: it is damaged, or of another format.
        OSError: it cannot be read.
    """
    manifest: Any = None
    try:
        if (path / MANIFEST).stat().st_size <= _LARGEST_MANIFEST:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            body = {key: value for key, value in manifest.items() if key != "run"}
            if manifest["run"] == digest(body) and body["format"] == _FORMAT:
                return manifest | {"shares": _sound_shares(manifest)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        pass
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(form, str) and _ANY_FORMAT.fullmatch(form) and form != _FORMAT:
        raise ValueError(
            f"{argument}: {path / MANIFEST} has the format {form!r}, this version writes {_FORMAT!r} and "
            f"cannot resume it; its parts can still be read. Name another folder"
        )
    raise ValueError(
        f"{argument}: {path / MANIFEST} is damaged, so that the run cannot be resumed; its parts can still be read. "
        f"Name another folder, or delete this one"
    )


def _sound_shares(manifest: dict[str, Any]) -> list[Share]:
    """The manifest's shares, if it has the types and numbers of one.

    Raises:
        ValueError, TypeError, KeyError: it does not.
    """
    shares = [
        Share(**{**entry, "batches": [Batch(**batch) for batch in entry["batches"]]}) for entry in manifest["shares"]
    ]
    batches = [batch for share in shares for batch in share.batches]
    documents = [number for batch in batches for number in batch.documents]
    increasing = [*(batch.boundaries for batch in batches), *(share.ends for share in shares)]
    numbers = [*documents, *(n for ends in increasing for n in ends), *(n for share in shares for n in share.rows)]
    if not (
        batches
        and all(isinstance(manifest[key], dict) for key in ("names", "identity", "made_with"))
        and all(isinstance(name, str) for name in manifest["names"].values())
        and all(type(number) is int and number >= 0 for number in numbers)
        and sorted(documents) == [*range(len(documents))]
        and all(batch.documents and batch.boundaries for batch in batches)
        and all(start < end for ends in increasing for start, end in pairwise([0, *ends]))
        and all(len(share.rows) == len(share.ends) > 0 for share in shares)
        and all(share.ends[-1] == sum(len(batch.boundaries) for batch in share.batches) for share in shares)
    ):
        raise ValueError("no manifest")
    return shares
