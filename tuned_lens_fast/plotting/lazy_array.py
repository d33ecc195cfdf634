"""Log-probabilities as an array that is not there: what is indexed of it is made, and no more."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuned_lens_fast.predictions import Predictions

#: More bytes than this of several layers are not made without a warning.
LARGE = 64 * 2**20


class LazyArray(np.lib.mixins.NDArrayOperatorsMixin):
    """fp32 ``(*batch, layers, tokens, vocab)``, log-probabilities or probabilities, made when they are indexed.

    ``array[..., 3, :, :]`` makes one layer. What needs the whole, such as arithmetic, a method of numpy's or
    ``np.asarray(array)``, makes it, and warns where that is large; nothing of it is kept.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, predictions: Predictions, exponential: bool = False) -> None:
        """``exponential``: probabilities."""
        self.predictions = predictions
        self.exponential = exponential

    @property
    def shape(self) -> tuple[int, ...]:
        return self.predictions.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """As numpy's, of which only what is indexed is made."""
        keys = list(key) if isinstance(key, tuple) else [key]
        keys = [np.asarray(part) if isinstance(part, list) else part for part in keys]
        used = [getattr(part, "ndim", 1) if _is_mask(part) else int(part is not None) for part in keys]
        dots = next((i for i, part in enumerate(keys) if part is Ellipsis), None)
        missing = self.ndim - sum(used) + (dots is not None)
        if missing < 0 or any(count != 1 for part, count in zip(keys, used, strict=True) if _is_mask(part)):
            return np.asarray(self)[key]
        at = len(keys) if dots is None else dots
        keys[at : at + (dots is not None)] = [slice(None)] * missing

        sizes = iter(self.shape)
        needed: list[NDArray[np.intp]] = []
        inside: list[Any] = []
        for part in keys:
            if part is None:
                inside.append(part)
                continue
            size = next(sizes)
            if isinstance(part, slice):
                needed.append(np.arange(size)[part])
                inside.append(slice(None))
            else:
                if _is_mask(part) and len(part) != size:
                    raise IndexError(f"index: got a mask of {len(part)} for a dimension of {size}")
                chosen = np.arange(size)[part]  # which raises what numpy does for one out of range
                there, back = np.unique(chosen, return_inverse=True)
                needed.append(there)
                inside.append(back.reshape(np.shape(chosen)) if np.ndim(chosen) else int(back.reshape(-1)[0]))
        return self._block(needed)[tuple(inside)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if copy is False:
            raise ValueError("copy: got False, and there is no array yet that could be shared")
        return self._block([np.arange(size) for size in self.shape]).astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [np.asarray(value) if isinstance(value, LazyArray) else value for value in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        """The whole array's, of what numpy's arrays have."""
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(np.asarray(self), name)

    def __repr__(self) -> str:
        kind = "probabilities" if self.exponential else "log-probabilities"
        return f"<{kind} {[*self.shape]}, {_size(self.nbytes)} if they were all made>"

    def _block(self, needed: list[NDArray[np.intp]]) -> NDArray[np.float32]:
        """Those of every dimension's numbers."""
        *batch, layers, tokens, vocab = needed
        shape = [len(numbers) for numbers in needed]
        size = math.prod(shape) * self.dtype.itemsize
        if len(layers) > 1 and size > LARGE:
            warnings.warn(
                f"log_probs: {_size(size)} of {len(layers)} layers are made at once; index a layer at a time, as in "
                f"log_probs[..., 3, :, :], or ask for a statistic, which needs none of it",
                stacklevel=3,
            )
        lead = self.predictions.lead
        positions = np.ravel_multi_index(np.ix_(*batch, tokens), tuple(lead)).reshape(-1)
        out = np.empty((len(layers), len(positions), len(vocab)), self.dtype)
        self.predictions.block(layers.tolist(), positions, vocab, out)
        if self.exponential:
            np.exp(out, out=out)
        places = out.reshape(len(layers), *shape[:-3], len(tokens), len(vocab))
        return np.moveaxis(places, 0, len(batch))


def _is_mask(part: Any) -> bool:
    return isinstance(part, (bool, np.bool_)) or getattr(part, "dtype", None) == np.bool_


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
