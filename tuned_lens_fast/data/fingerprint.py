"""Tells two models, two lenses or two texts apart without keeping either: hashes for a data set's manifest.

They stand beside the way from hidden state to statistics: rows of different ones must not be mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Numbers of a tensor that are looked at, spread over all of it.
_SAMPLE = 4096


def of_model(model: Any) -> str:
    """SHA-256 of the config, and of the name, shape, dtype, checksum and a sample of every tensor.

    Fine-tuned, edited, cast or differently configured models differ; where a model lies and on which device does not
    count.
    """
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):  # quantized modules keep other things there as well
            _add(digest, name, tensor, sample=True)
    return digest.hexdigest()


def of_lens(lens: Any) -> str:
    """SHA-256 of the lens's class, all of its tensors, and a sample of the norm and head it reads with."""
    digest = hashlib.sha256(type(lens).__name__.encode())
    for name, tensor in sorted(lens.state_dict().items()):
        _add(digest, name, tensor)
    for part in (lens.unembed.norm, lens.unembed.head):
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                _add(digest, name, value, sample=True)
            elif not isinstance(value, torch.nn.Module):
                digest.update(f"{name} {value}".encode())
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


def _add(digest: Any, name: str, tensor: Tensor, sample: bool = False) -> None:
    digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    if tensor.is_meta:
        return  # weights that are loaded only when they are used
    values = tensor.detach().reshape(-1)
    if sample and values.numel():
        # The sum of all bits notices an edit anywhere, and the sample that values were put elsewhere.
        words = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(values.element_size(), torch.int64))
        digest.update(str(int(words.sum(dtype=torch.int64))).encode())
        # An odd step wanders through the columns of a matrix, where a divisor of its width would keep to one.
        values = values[:: values.numel() // _SAMPLE | 1]
    digest.update(values.contiguous().view(torch.uint8).cpu().numpy())
