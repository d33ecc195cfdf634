"""Several devices where there is one: tensors that say they are on ``cpu:1`` or ``cpu:2``, and do not mix.

A tensor's device is that of its memory. What PyTorch allows between two GPUs is allowed here, copies above all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
FIRST, SECOND, THIRD = (torch.device("cpu", index) for index in (1, 2, 3))

#: Where memory is, by its address; the references keep an address from being used again.
_places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
#: Operations that take tensors of two devices: copies; and those that also take indices on the CPU.
_ACROSS = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index.", "aten::index_put", "aten::_index_put")
#: Operations that make a tensor like another, and to which PyTorch itself names the device of that one.
_LIKE = ("aten::new_", "_like")


def place_of(tensor: Tensor) -> torch.device:
    if tensor.is_meta:
        return torch.device("meta")
    held = _places.get(tensor.untyped_storage()._cdata)
    return CPU if held is None or held[0].expired() else held[1]


def put(tensor: Tensor, device: torch.device) -> Tensor:
    storage = tensor.untyped_storage()
    _places[storage._cdata] = StorageWeakRef(storage), device
    return tensor


class _Names(TorchFunctionMode):
    """Tensors say where they are, and go elsewhere when they are told."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return place_of(args[0])
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(*args, **({"device": "cpu"} if func is torch.Tensor.cpu else kwargs))
        if func is torch.tensor and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return put(torch.tensor(*args, **kwargs), device)  # which operations do not tell
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, Tensor):
                device, dtype = place_of(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                device = value
            elif isinstance(value, torch.dtype):
                dtype = value
        here = place_of(tensor)
        device = here if device is None else torch.device(device)
        dtype = dtype or tensor.dtype
        if device == here:
            return torch.Tensor.to(tensor, dtype, copy=kwargs.get("copy", False))
        if device.type == "meta" or tensor.is_meta:
            return torch.Tensor.to(tensor, device, dtype)
        return put(torch.Tensor.to(tensor, dtype, copy=True), device)


class _Checks(TorchDispatchMode):
    """Operations refuse tensors of two devices, and what they make is where their tensors are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [place_of(tensor) for tensor in tensors if tensor.ndim or place_of(tensor) != CPU]
        name = func.name()
        others = {place for place in places if place != places[0]}
        if name.startswith(_INDEXED):
            others.discard(CPU)
        if others and not name.startswith(_ACROSS):
            raise RuntimeError(f"{name}: tensors on {', '.join(map(str, dict.fromkeys(places)))}")
        out = func(*args, **kwargs)
        device = kwargs.get("device")
        here = next((place for place in places if place.type != "meta"), CPU)
        if device is None or (device == CPU and any(part in name for part in _LIKE)):
            device = here
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and not made.is_meta and device.type != "meta":
                held = _places.get(made.untyped_storage()._cdata)
                if held is None or held[0].expired():
                    put(made, device)
        return out


@contextmanager
def emulated_devices() -> Iterator[None]:
    """Within it there are several devices, in threads that are started as well."""
    run = threading.Thread.run

    def with_devices(thread: threading.Thread) -> None:
        with _Names(), _Checks():
            run(thread)

    threading.Thread.run = with_devices  # type: ignore[method-assign]
    try:
        with _Names(), _Checks():
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        _places.clear()
