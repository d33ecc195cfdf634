"""What a lens reads with, on the other devices of a model whose blocks lie on several.

Beside the way from hidden state to statistics: a layer is read where its states are, so that only statistics travel.
Norm, head and translators are copied there once, and again when they have changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tuned_lens_fast.engines.interface import Head, Norm, Readout, Translator
from tuned_lens_fast.models.alias import frozen_alias

#: How many times what is copied has to fit the free memory of a device.
_ROOM = 2


class _Replicas:
    """Copies of tensors on other devices, by name; a copy is made anew when its original has changed."""

    def __init__(self) -> None:
        # The originals are kept too, so that no other is at their address.
        self._held: dict[Any, tuple[list[Any], list[Tensor], Any]] = {}
        self._fits: dict[tuple[torch.device, int], bool] = {}
        self._lock = threading.Lock()

    def fits(self, device: torch.device, size: int) -> bool:
        """Whether ``size`` bytes are copied to ``device``; decided once, so that a run does not change its ways."""
        with self._lock:
            return self._fits.setdefault((device, size), _ROOM * size <= _free(device))

    def copy(self, name: Any, device: torch.device, part: Any) -> Any:
        """``part``, a dataclass, with its tensors and modules on ``device``."""
        tensors = [value for value in vars(part).values() if isinstance(value, Tensor)]
        module = getattr(part, "module", None)
        originals = [*tensors, *(() if module is None else (*module.parameters(), *module.buffers()))]
        now = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in originals]
        with self._lock:
            held = self._held.get((name, device))
            if held is None or held[0] != now:
                self._held.pop((name, device), None)
                moved = {key: v.detach().to(device) for key, v in vars(part).items() if isinstance(v, Tensor)}
                if module is not None:
                    moved["module"] = frozen_alias(module).to(device)
                held = self._held[name, device] = now, originals, replace(part, **moved)
            return held[2]


_REPLICAS: WeakKeyDictionary[Any, _Replicas] = WeakKeyDictionary()
_LOCK = threading.Lock()


def readout_on(device: torch.device, lens: Any, layers: Iterable[int], readout: Readout) -> Readout | None:
    """``readout``, of those layers of ``lens``, on another device; None where there is no memory for it."""
    with _LOCK:
        replicas = _REPLICAS.setdefault(lens, _Replicas())
    parts: list[Norm | Head | Translator] = [t for t in (*readout.translators, readout.norm, readout.head) if t]
    if not replicas.fits(device, sum(_bytes(part) for part in parts)):
        return None
    return Readout(
        tuple(
            None if translator is None else replicas.copy(layer, device, translator)
            for layer, translator in zip(layers, readout.translators, strict=True)
        ),
        replicas.copy("norm", device, readout.norm),
        replicas.copy("head", device, readout.head),
    )


def by_device(hidden: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """The numbers of the entries on each device."""
    found: dict[torch.device, list[int]] = {}
    for number, entry in enumerate(hidden):
        found.setdefault(entry.device, []).append(number)
    return found


def _bytes(part: Norm | Head | Translator) -> int:
    return sum(value.nbytes for value in vars(part).values() if isinstance(value, Tensor))


def _free(device: torch.device) -> float:
    """Bytes that can be allocated on ``device``, where it tells."""
    if device.type != "cuda":
        return torch.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
