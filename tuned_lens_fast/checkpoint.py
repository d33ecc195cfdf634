"""Opens a checkpoint that nobody vouches for: nothing of it runs, and no more is read of it than is asked for.

``artifacts`` makes a lens of what is in it. Tensors are mapped from the file: their shapes can be compared with what a
model needs before any of their numbers is in memory.
"""

from __future__ import annotations

import os
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open

from tuned_lens_fast.messages import quoted, shortened

#: Bytes of a file that may describe its tensors; a few hundred for each would do.
MOST_DESCRIPTION = 2**20
#: Tuples that a pickle may make, four for each tensor: to hash tuples within tuples takes the processor's stack.
MOST_TUPLES = 20_000
#: What the pickle of a state dict refers to. ``torch.load(weights_only=True)`` runs no code either, but calls ``set``
#: and ``bytearray`` with whatever numbers a pickle has.
_KNOWN = re.compile(
    r"collections OrderedDict|_codecs encode|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|"
    r"torch \w+Storage|torch\.storage UntypedStorage|torch (b?float|int|uint|bool|complex)\w*"
)


def load_checkpoint(path: Path) -> Any:
    """What ``torch.save`` (since PyTorch 1.6) or safetensors wrote to ``path``, its tensors mapped from the file.

    A file named ``.safetensors`` is one of safetensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _Refused as error:
        raise ValueError(f"checkpoint: cannot read {path}: {error}") from error
    except Exception as error:  # whatever bytes that are none of a checkpoint's lead to
        why = f" ({shortened(error, 100)})" if str(error) else ""
        raise ValueError(f"checkpoint: cannot read {path}: it is truncated, or no checkpoint{why}") from error


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """``safetensors.safe_open``, of a file whose header has at most :data:`MOST_DESCRIPTION` bytes.

    Raises:
        SafetensorError: the file is damaged.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_DESCRIPTION:
        raise SafetensorError(f"a header of {length:,} bytes, wanted at most {MOST_DESCRIPTION:,}")
    with safe_open(path, framework="pt") as opened:
        yield opened


#: Instructions of pickles that ``torch.save`` writes for no state dict.
_NEVER = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "EMPTY_SET", "FROZENSET", "BYTEARRAY8"}


_OTHER_OBJECTS = (
    "it holds other objects than dense tensors, which could run code ({}); where it was made, save a dict of its "
    "tensors and numbers in their place"
)


class _Refused(Exception):
    """A file that holds what no checkpoint of a lens holds."""


def _check_archive(path: Path) -> None:
    """Refuse what ``torch.load`` should not be given: entries larger than they are in the file, and other names."""
    with ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != ZIP_STORED:
                raise _Refused(f"its entry {quoted(entry.filename)} is compressed, as torch.save never does")
        descriptions = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(descriptions) != 1:
            raise _Refused("it is no checkpoint: wanted one entry data.pkl")
        size = descriptions[0].file_size
        if size > MOST_DESCRIPTION:
            raise _Refused(f"what describes its tensors has {size:,} bytes, wanted at most {MOST_DESCRIPTION:,}")
        tuples = 0
        for opcode, named, _ in pickletools.genops(archive.read(descriptions[0])):
            tuples += "TUPLE" in opcode.name
            if tuples > MOST_TUPLES:
                raise _Refused(f"it holds more than {MOST_TUPLES:,} tuples")
            if opcode.name == "GLOBAL" and not _KNOWN.fullmatch(str(named)):
                called = shortened(str(named).replace(" ", "."), 80)
                raise _Refused(_OTHER_OBJECTS.format(called))
            if opcode.name in _NEVER:
                raise _Refused(_OTHER_OBJECTS.format(opcode.name))
