"""Reads tensors out of a checkpoint that nobody vouches for: what it says of all of them first, then those wanted.

``artifacts`` makes a lens of them. A checkpoint of PyTorch, since its version 1.6, is a zip archive with one entry a
storage, and a pickle, ``data.pkl``, that names each tensor's storage, shape and strides. ``torch.load`` with
``weights_only=True`` runs no code of it either, but allocates what the archive claims before its caller sees a shape,
and calls ``set`` or ``bytearray`` with the pickle's numbers. Here nothing that the pickle names is called.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuned_lens_fast.messages import quoted, shortened

#: Bytes of a file that may describe its tensors; a few hundred for each would do.
MOST_DESCRIPTION = 2**20
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]  #: onto the CPU, as long as the file is open; ValueError if it is damaged


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Any]:
    """What ``torch.save`` or safetensors wrote to ``path``, with a :class:`StoredTensor` in place of every tensor.

    They can be read within the block; nothing is allocated for those that are not. A file named ``.safetensors`` is
    one of safetensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds other things than dense tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    with ExitStack() as stack:
        with _damage_named(path):
            if path.suffix == ".safetensors":
                file = stack.enter_context(open_safetensors(path))

                def read(name: str) -> Tensor:
                    with _damage_named(path):
                        return file.get_tensor(name)

                found: Any = {
                    name: StoredTensor(tuple(file.get_slice(name).get_shape()), partial(read, name))
                    for name in file.keys()  # noqa: SIM118
                }
            else:
                archive = stack.enter_context(ZipFile(stack.enter_context(_BoundedReader(path))))
                found = _Archive(path, archive).description()
        yield found


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


class _Refused(Exception):
    """What is read of a file is not what may be in it."""


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise ValueError(f"checkpoint: cannot read {path}: {error}") from error
    except Exception as error:
        why = f" ({shortened(error, 100)})" if str(error) else ""
        raise ValueError(f"checkpoint: cannot read {path}: it is truncated, or no checkpoint{why}") from error


class _BoundedReader(io.BufferedReader):
    """A file of which no read is larger than what may describe its tensors, whatever sizes it claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._size - self.tell() if size is None or size < 0 else size
        if wanted > MOST_DESCRIPTION:
            raise _Refused(f"what describes its tensors has {wanted:,} bytes, wanted at most {MOST_DESCRIPTION:,}")
        return super().read(wanted)


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype | None  #: None where the tensor says it


class _Archive:
    """The zip archive of ``torch.save``."""

    def __init__(self, path: Path, archive: ZipFile) -> None:
        self._path, self._archive = path, archive
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Refused("it is no checkpoint: wanted one entry data.pkl")
        self._root = roots[0]

    def description(self) -> Any:
        order = f"{self._root}byteorder"
        if order in self._archive.namelist() and self._entry("byteorder") != sys.byteorder.encode():
            raise _Refused("it was written on a machine with another order of bytes; save it anew there as safetensors")
        return _Description(io.BytesIO(self._entry("data.pkl")), self._read).load()

    def _entry(self, name: str) -> bytes:
        with self._open(name) as stream:
            return stream.read(MOST_DESCRIPTION + 1)

    def _open(self, name: str) -> Any:
        info = self._archive.getinfo(self._root + name)
        # Of a compressed entry a few bytes may become any number.
        if info.compress_type != ZIP_STORED:
            raise _Refused(f"its entry {quoted(name)} is compressed, as torch.save never does")
        return self._archive.open(info)

    def _read(
        self, storage: _Storage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> Tensor:
        with _damage_named(self._path):
            numbers = math.prod(shape)
            if not numbers:
                return torch.empty(shape, dtype=dtype)
            extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            if extent < numbers:
                raise _Refused(f"a tensor holds fewer numbers than its shape {[*shape]}")
            if extent > 2 * numbers:
                raise _Refused(f"a tensor of shape {[*shape]} lies strewn over {extent:,} numbers")
            data = torch.empty(extent * dtype.itemsize, dtype=torch.uint8)
            view = data.numpy().data
            with self._open(f"data/{storage.key}") as stream:
                # From the start to the end, the archive's checksum is compared.
                if offset:
                    stream.seek(offset * dtype.itemsize)
                for start in range(0, len(view), MOST_DESCRIPTION):
                    part = view[start : start + MOST_DESCRIPTION]
                    if stream.readinto(part) != len(part):
                        raise _Refused("it is truncated")
            return data.view(dtype).as_strided(shape, stride)


class _Description(pickle._Unpickler):
    """The objects of ``data.pkl``, tensors as :class:`StoredTensor`; nothing is called but methods of this class."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, read: Callable[..., Tensor]) -> None:
        super().__init__(file)
        self._read = read
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): self._dict,
            ("_codecs", "encode"): self._bytes,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_dtype,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.storage", "UntypedStorage"): None,
            **{("torch", name): dtype for name, dtype in _DTYPES.items()},
        }

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        called = shortened(f"{module}.{name}", 80)
        raise _Refused(f"it holds other objects than dense tensors, which could run code ({called})")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        if type(key) is not str:
            raise _Refused("it names a storage that is no entry")
        return _Storage(key, dtype)

    @staticmethod
    def _dict() -> dict[Any, Any]:
        return {}

    @staticmethod
    def _bytes(text: str, _: str) -> bytes:
        return text.encode("latin1")

    @staticmethod
    def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
        return tensor

    def _tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        return self._stored(storage, storage.dtype, offset, shape, stride)

    def _tensor_of_dtype(
        self, storage: _Storage, offset: int, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
    ) -> StoredTensor:
        return self._stored(storage, dtype, offset, shape, stride)

    def _stored(self, storage: _Storage, dtype: Any, offset: int, shape: Any, stride: Any) -> StoredTensor:
        numbers = (offset, *shape, *stride)
        if not isinstance(dtype, torch.dtype) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _Refused("it describes a tensor by other things than numbers")
        return StoredTensor(tuple(shape), partial(self._read, storage, dtype, offset, tuple(shape), tuple(stride)))

    def _set_item(self) -> None:
        self._set_pairs([self.stack.pop(-2), self.stack.pop()])

    def _set_items(self) -> None:
        self._set_pairs(self.pop_mark())

    def _set_pairs(self, pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # The hash of a deeply nested tuple would overflow the stack.
            if type(key) not in (str, int):
                raise _Refused(f"it has a key of type {type(key).__name__}")
            dict.__setitem__(self.stack[-1], key, value)

    def _drop_state(self) -> None:
        self.stack.pop()

    #: Those that ``torch.save`` writes; what an OrderedDict has for attributes is of no use here.
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{
            code[0]: pickle._Unpickler.dispatch[code[0]]
            for code in (
                *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID),
                *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
                *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
                *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING),
                *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.APPEND, pickle.APPENDS),
                *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            )
        },
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _drop_state,
    }
