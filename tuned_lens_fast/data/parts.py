"""The Parquet data set on disk: a folder, a manifest, and parts that are whole or not there.

It ends the way from hidden state to statistics where they are too many to keep: ``dataset`` says what is computed,
this module what of it is already on disk, and adds the rest. A part has the checksum of its content in its name, so
that one rename puts both there, and damage is noticed whenever the content is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuned_lens_fast.atomic_write import atomic_write, sync_folder
from tuned_lens_fast.data.folder import cannot_write, check_identity, digest, held
from tuned_lens_fast.data.table import float_encodings, table_of
from tuned_lens_fast.stats import LensStats

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset

# Readers of a folder of Parquet pass over names that begin so.
MANIFEST = "_run.json"
_FORMAT = "tuned_lens_fast data set 2"
_ANY_FORMAT = re.compile(r"tuned_lens_fast data set \d{1,9}")
#: Bytes of a manifest at most: several million documents.
_LARGEST_MANIFEST = 2**30
#: The key of every part's metadata, which is JSON: the run, the model, the lens, the versions.
METADATA = b"tuned_lens_fast"
_PART = re.compile(r"part-(\d{6,9})-(\d{6,9})-([0-9a-f]{16})\.parquet")
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


@dataclass(frozen=True)
class RunState:
    """What of a run is on disk. ``str(state)`` says it in a line."""

    path: Path
    batches: list[Batch]
    whole: dict[tuple[int, int], Path]  #: by batch and chunk, the parts whose content is what was written
    damaged: dict[tuple[int, int], Path]  #: the other parts

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Batch and chunk of the parts that are not there at all."""
        there = self.whole.keys() | self.damaged.keys()
        return [place for place in _places(self.batches) if place not in there]

    @property
    def complete(self) -> bool:
        """Whether every part is there and whole."""
        return len(self.whole) == len(_places(self.batches))

    def __str__(self) -> str:
        parts = len(_places(self.batches))
        documents = sum(len(batch.documents) for batch in self.batches)
        held = f"{parts:,}" if self.complete else f"{len(self.whole):,} of {parts:,}"
        lacks = [f"{kind} {_named(names)}" for kind, names in (
            ("damaged:", [path.name for path in self.damaged.values()]),
            ("missing:", [_stem(*place) for place in self.missing]),
        ) if names]  # fmt: skip
        return f"{self.path}: {held} parts, {documents:,} documents, {'; '.join(lacks) or 'complete'}"


class RunFolder:
    """One run's folder, as long as this process holds it; see :func:`run_folder`."""

    def __init__(self, path: Path, batches: list[Batch], metadata: dict[str, Any], begun_with: dict[str, Any]) -> None:
        self.path = path
        self.batches = batches
        self.begun_with = begun_with  #: ``made_with`` of the process that planned the run
        self._metadata = metadata
        _parts(path, batches, "out")
        for name in os.listdir(path):
            if _LEFTOVER.fullmatch(name):
                (path / name).unlink()

    def unfinished(self) -> list[set[int]]:
        """For every batch the chunks whose part is not there. Damaged parts are removed, with a warning.

        Raises:
            ValueError: a part of another run.
            OSError: a part cannot be read, or not removed.
        """
        state = _survey(self.path, self.batches, self._metadata["run"], "out")
        if state.damaged:
            names = _named([path.name for path in state.damaged.values()])
            warnings.warn(f"out: parts in {self.path} are damaged and are written anew: {names}", stacklevel=2)
        # Before the new ones are there: rows that differ in their last bits would get another name beside the old.
        for path in state.damaged.values():
            path.unlink()
        return [
            {chunk for chunk in range(len(batch.rows)) if (number, chunk) not in state.whole}
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
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = table_of(stats, documents, positions, token_ids, real, tokenizer)
        of_layer = max(1, int(real.sum()))
        metadata = {**self._metadata, "batch": batch, "chunk": chunk}
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({METADATA: json.dumps(metadata)}),
            sink,
            row_group_size=of_layer * -(-_GROUP_ROWS // of_layer),
            compression="zstd",
            use_dictionary=[name for name in _IDS if name in table.column_names],
            column_encoding=float_encodings(table.schema),
        )
        content = memoryview(sink.getvalue())
        path = self.path / f"{_stem(batch, chunk)}-{_checksum([content])}.parquet"
        try:
            with atomic_write(path) as aside:
                aside.write_bytes(content)
        except OSError as error:
            raise cannot_write(path, error) from error


@contextmanager
def run_folder(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    names: dict[str, str],
    made_with: dict[str, Any],
    plan: Callable[[], list[Batch]],
) -> Iterator[RunFolder]:
    """The folder ``path`` for one run: a new one, or one that an earlier process left unfinished.

    Args:
        path: made if it is not there.
        identity: all that the rows depend on, ready for JSON; a folder with another identity is refused.
        names: what people call some entries of ``identity`` that are only hashes there.
        made_with: versions and the like, on which the last bits of the rows may depend; recorded and not compared.
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
            _parts(path, [], "out")
        batches = plan()
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    with held(path):
        if batches is not None and not (path / MANIFEST).exists():
            _write_manifest(path, identity, names, made_with, batches)
        manifest = _read_manifest(path, "out")
        check_identity(path, manifest, identity, names)
        metadata = {"run": manifest["run"], **names, "watch": identity.get("watch"), **made_with}
        yield RunFolder(path, manifest["batches"], metadata, manifest["made_with"])


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
    return _survey(path, manifest["batches"], manifest["run"], "run")


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


def _places(batches: list[Batch]) -> list[tuple[int, int]]:
    """Batch and chunk of every part."""
    return [(number, chunk) for number, batch in enumerate(batches) for chunk in range(len(batch.rows))]


def _stem(batch: int, chunk: int) -> str:
    return f"part-{batch:06}-{chunk:06}"


def _named(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _parts(path: Path, batches: list[Batch], argument: str) -> dict[tuple[int, int], Path]:
    """The files of parts by batch and chunk; refuses what else readers of the data set would see."""
    places, found, strangers = set(_places(batches)), {}, []
    for name in sorted(os.listdir(path)):
        match = _PART.fullmatch(name)
        place = (int(match[1]), int(match[2])) if match else None
        if place in places and place not in found:
            found[place] = path / name
        elif not name.startswith((".", "_")):
            strangers.append(name)
    if strangers:
        raise ValueError(
            f"{argument}: {path} holds {_named(strangers, 1)}, no part of this run; "
            f"wanted a folder of its own: {'name a new one' if argument == 'out' else 'move it away'}"
        )
    return found


def _survey(path: Path, batches: list[Batch], run: str, argument: str) -> RunState:
    state = RunState(path, batches, {}, {})
    for place, part in _parts(path, batches, argument).items():
        (state.whole if _is_whole(part, place, run, argument) else state.damaged)[place] = part
    return state


def _is_whole(part: Path, place: tuple[int, int], run: str, argument: str) -> bool:
    """Whether the file holds what was written to it, and for this place in the run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(part, "rb") as file:
        if not part.stem.endswith(_checksum(iter(lambda: file.read(2**20), b""))):
            return False
    try:
        made = json.loads(pq.read_metadata(part).metadata[METADATA])
        of, there = made["run"], (made["batch"], made["chunk"])
    except (pa.ArrowException, ValueError, KeyError, TypeError):
        return False
    if of != run:
        raise ValueError(f"{argument}: {part} is a part of another run; name another folder, or move it away")
    return there == place


def _checksum(blocks: Iterator[bytes] | list[memoryview]) -> str:
    """The first 64 bits of the SHA-256, which processors have instructions for."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()[:16]


def _write_manifest(
    path: Path, identity: dict[str, Any], names: dict[str, str], made_with: dict[str, Any], batches: list[Batch]
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
            aside.write_text(json.dumps({"run": digest(body), **body}, indent=1), encoding="utf-8")
    except OSError as error:
        raise cannot_write(path / MANIFEST, error) from error


def _read_manifest(path: Path, argument: str) -> dict[str, Any]:
    """The manifest of the run in ``path``, its batches as :class:`Batch`.

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
                return manifest | {"batches": _sound_batches(manifest)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        pass
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(form, str) and _ANY_FORMAT.fullmatch(form) and form != _FORMAT:
        raise ValueError(
            f"{argument}: {path / MANIFEST} has the format {form!r}, this version writes {_FORMAT!r}, whose parts have "
            f"checksums, and cannot resume it; its parts can still be read. Name another folder"
        )
    raise ValueError(
        f"{argument}: {path / MANIFEST} is damaged, so that the run cannot be resumed; its parts can still be read. "
        f"Name another folder, or delete this one"
    )


def _sound_batches(manifest: dict[str, Any]) -> list[Batch]:
    """The manifest's batches, if it has the types and numbers of one.

    Raises:
        ValueError, TypeError, KeyError: it does not.
    """
    batches = [Batch(**entry) for entry in manifest["batches"]]
    documents = [number for batch in batches for number in batch.documents]
    numbers = [*documents, *(n for batch in batches for n in (*batch.boundaries, *batch.rows))]
    if not (
        batches
        and all(isinstance(manifest[key], dict) for key in ("names", "identity", "made_with"))
        and all(isinstance(name, str) for name in manifest["names"].values())
        and all(type(number) is int and number >= 0 for number in numbers)
        and sorted(documents) == [*range(len(documents))]
        and all(batch.documents and len(batch.rows) == len(batch.boundaries) > 0 for batch in batches)
        and all(start < end for batch in batches for start, end in pairwise([0, *batch.boundaries]))
    ):
        raise ValueError("no manifest")
    return batches
