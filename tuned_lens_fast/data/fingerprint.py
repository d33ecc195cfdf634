"""Tells two models, two lenses or two texts apart without keeping either: hashes for a data set's manifest.

They stand beside the way from hidden state to statistics: rows of different ones must not be mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tuned_lens_fast.models.alias import is_fully_sharded
from tuned_lens_fast.models.resident import plain, stored

#: Numbers of a tensor that are looked at, spread over all of it.
_SAMPLE = 4096


def of_model(model: Any) -> str:
    """SHA-256 of the config, and of the name, shape, dtype, checksum and a sample of every tensor.

    Fine-tuned, edited, cast or differently configured models differ; where a model lies does not count: split over
    ranks or offloaded, it has the hash of the whole one. Tensors are looked at one by one, as they are stored, and the
    ranks of a split model have to ask together.
    """
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for part in model.modules():
        if is_fully_sharded(part):
            part.reshard()  # what is gathered to compute with may be of another dtype
    # Not its state_dict(): that runs hooks, and some quantised weights are changed by it.
    for name, module, own in sorted(_names(model), key=lambda entry: entry[0]):
        for inner, tensor in _dense(name, stored(module, own)):
            _add(digest, inner, tensor, sample=True)
    return digest.hexdigest()


def of_lens(lens: Any) -> str:
    """SHA-256 of the lens's class, all of its tensors, and a sample of the norm and head it reads with."""
    digest = hashlib.sha256(type(lens).__name__.encode())
    for name, module, own in sorted(_names(lens), key=lambda entry: entry[0]):
        _add(digest, name, plain(stored(module, own)))
    for part in (lens.unembed.norm, lens.unembed.head):
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                _add(digest, name, value, sample=True)
            elif not isinstance(value, nn.Module):
                digest.update(f"{name} {value}".encode())
            else:
                for inner, tensor in (*value.named_parameters(), *value.named_buffers()):
                    _add(digest, f"{name}.{inner}", plain(tensor), sample=True)
    return digest.hexdigest()


def of_tensors(tensors: Iterable[Tensor | None]) -> str:
    """SHA-256 of shapes, dtypes and all values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _add(digest, "", torch.empty(0) if tensor is None else tensor)
    return digest.hexdigest()


def of_text(parts: Iterable[str | int]) -> str:
    """SHA-256 of strings and numbers, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def _names(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every tensor of a state dict: its name there, the module that it is of, and its name in that."""
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        for own, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and (own in module._parameters or own in buffers):
                yield f"{path}.{own}" if path else own, module, own


def _dense(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of, by name."""
    quant_state = getattr(tensor, "quant_state", None)
    tensor = plain(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _dense(f"{name}.{inner}", getattr(tensor, inner))
        return
    yield name, tensor.as_subclass(Tensor)
    while quant_state is not None:  # of bitsandbytes, whose scales may be quantised in turn
        name += ".quant_state"
        for inner, value in sorted(vars(quant_state).items()):
            if isinstance(value, Tensor):
                yield f"{name}.{inner}", value
        quant_state = getattr(quant_state, "state2", None)


def _add(digest: Any, name: str, tensor: Tensor, sample: bool = False) -> None:
    digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    if tensor.is_meta:
        return  # nobody has its numbers
    values = tensor.detach().reshape(-1)
    if sample and values.numel():
        # The sum of all bits notices an edit anywhere, and the sample that values were put elsewhere.
        words = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(values.element_size(), torch.int64))
        digest.update(str(int(words.sum(dtype=torch.int64))).encode())
        # An odd step wanders through the columns of a matrix, where a divisor of its width would keep to one.
        values = values[:: values.numel() // _SAMPLE | 1]
    digest.update(values.contiguous().view(torch.uint8).cpu().numpy())
