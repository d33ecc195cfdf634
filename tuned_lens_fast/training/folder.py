"""The folder of a training run: which run it is, the last checkpoint, the report; whole whatever happens in between.

Beside the way through training, at every checkpoint. ``data/folder`` has what folders of all runs share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tuned_lens_fast.atomic_write import atomic_write, sync_folder
from tuned_lens_fast.data.folder import LOCK, cannot_write, check_identity, digest, held
from tuned_lens_fast.messages import shortened

MANIFEST = "_training.json"
CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
PICTURE = "report.png"
LENS = ("params.pt", "config.json")
_FORMAT = "tuned_lens_fast training 1"
_OURS = {MANIFEST, CHECKPOINT, REPORT, PICTURE, LOCK, *LENS}


class TrainingFolder:
    """One run's folder, as long as this process holds it; see :func:`training_folder`."""

    def __init__(self, path: Path, run: str, begun_with: dict[str, Any]) -> None:
        self.path = path
        self.run = run  #: its identity, hashed
        self.begun_with = begun_with  #: ``made_with`` of the process that began the run
        for name in os.listdir(path):
            stem = name.rpartition(".")[0].removeprefix(".")
            if name.startswith(".") and stem in _OURS:
                (path / name).unlink(missing_ok=True)  # what a killed process was writing

    def report(self) -> dict[str, Any] | None:
        """What the report says, if the run is finished.

        Raises:
            ValueError: it is damaged.
        """
        path = self.path / REPORT
        if not path.exists():
            return None
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            return report if report["run"] == self.run and report["finished"] else None
        except (ValueError, KeyError, TypeError) as error:
            instead = "delete it, and the same call goes on"
            if not (self.path / CHECKPOINT).exists():
                instead = "the lens beside it is whole, but to train again takes another folder"
            raise ValueError(f"out: {path} is damaged; {instead}") from error

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, its tensors on the CPU; None before the first.

        Raises:
            ValueError: it is damaged, or another run's.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            run = state["run"]
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever bytes that are none of a checkpoint's lead to
            why = shortened(error, 100)
            raise ValueError(f"out: {path} is damaged ({why}); delete it to train from the start") from error
        if run != self.run:
            raise ValueError(f"out: {path} is a checkpoint of another run; move it away")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Put a checkpoint in the place of the last.

        Raises:
            OSError: it cannot be written; the last one stays.
        """
        with self.writing(CHECKPOINT) as aside:
            torch.save({**state, "run": self.run}, aside)

    def write_report(self, text: str) -> None:
        """Put a report in the place of the last.

        Raises:
            OSError: it cannot be written; the last one stays.
        """
        with self.writing(REPORT) as aside:
            aside.write_text(text, encoding="utf-8")

    def finish(self, report: str) -> None:
        """Write the report of a run that has put all else in the folder; there is nothing left to go on from."""
        self.write_report(report)
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to, which is renamed to ``name`` when the block ends well.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        with writing(self.path / name), atomic_write(self.path / name) as aside:
            yield aside


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, what cannot be written is told of in one sentence."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except RuntimeError as error:
        # What torch.save makes of a full disk, which it does not tell the reason of.
        raise OSError(f"out: cannot write {path}: {shortened(error, 150)}") from error


def check_folder(out: str | os.PathLike[str], resume: bool) -> Path:
    """That ``out`` can be a run's folder: not there, empty, or one that a run has begun. Nothing is written.

    Raises:
        ValueError: it holds other things, or a run that must not be gone on with.
        NotADirectoryError: it is a file.
    """
    path = Path(out)
    if not path.exists():
        return path
    if not path.is_dir():
        raise NotADirectoryError(f"out: {path} is a file, wanted a folder")
    if (path / MANIFEST).exists():
        if not resume:
            raise ValueError(
                f"out: {path} holds a run already, and resume is False; name another folder, or delete that one"
            )
    else:
        strangers = sorted(name for name in os.listdir(path) if name != LOCK and not name.startswith("."))
        if strangers:
            raise ValueError(f"out: {path} holds {strangers[0]}, and no run of training; name a new folder")
    return path


@contextmanager
def training_folder(
    out: str | os.PathLike[str],
    identity: dict[str, Any],
    names: dict[str, str],
    made_with: dict[str, Any],
    resume: bool,
) -> Iterator[TrainingFolder]:
    """The folder ``out`` for one run: a new one, or one that an earlier process left.

    Args:
        out: made if it is not there.
        identity: all that the trained parameters depend on, ready for JSON; a folder with another one is refused.
        names: what people call some entries of ``identity`` that are only hashes there.
        made_with: versions and the like, on which the last bits may depend; recorded and not compared.
        resume: False refuses a folder with a run in it.

    Raises:
        ValueError: the folder is another run's, holds other things, or has a damaged manifest.
        BlockingIOError: another process is writing there.
        OSError: the folder cannot be made or written.
    """
    path = check_folder(out, resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    with held(path):
        if not (path / MANIFEST).exists():
            body = {"format": _FORMAT, "names": names, "identity": identity, "made_with": made_with}
            text = json.dumps({"run": digest(body), **body}, indent=1)
            with writing(path / MANIFEST), atomic_write(path / MANIFEST) as aside:
                aside.write_text(text, encoding="utf-8")
        manifest = _read_manifest(path)
        check_identity(path, manifest, identity, names)
        yield TrainingFolder(path, manifest["run"], manifest["made_with"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "run"}
        if manifest["run"] == digest(body) and body["format"] == _FORMAT:
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"out: {path / MANIFEST} is damaged or of another version, so that the run cannot be resumed; name another "
        f"folder, or delete this one"
    )
