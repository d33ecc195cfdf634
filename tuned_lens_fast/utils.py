"""What tuned-lens has under this name: small helpers of training scripts. Nothing else here uses more than one of them.

Trees are nested dicts, lists and tuples of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
AnyTree = Tensor | dict[Any, "AnyTree"] | list["AnyTree"] | tuple["AnyTree", ...]
TreeType = TypeVar("TreeType", bound=AnyTree)


def assert_type(typ: type[T], obj: Any) -> T:
    """``obj``, which is a ``typ``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(obj, typ):
        raise TypeError(f"obj: got a {type(obj).__name__}, wanted a {typ.__name__}")
    return obj


def maybe_all_cat(x: Tensor) -> Tensor:
    """``x`` ``[n, ...]`` of all processes, one after the other; ``x`` itself without ``torch.distributed``."""
    if not dist.is_initialized():
        return x
    found = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(found, x)
    return found


def maybe_all_gather_lists(lst: list) -> list:
    """The lists of all processes, one after the other; ``lst`` itself without ``torch.distributed``."""
    if not dist.is_initialized():
        return lst
    found: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, lst)
    return [*itertools.chain.from_iterable(found)]


def maybe_all_reduce(x: Tensor, op: str = "mean") -> Tensor:
    """``x``, overwritten with the mean or sum over all processes; as it is without ``torch.distributed``.

    Raises:
        ValueError: ``op`` is neither "mean" nor "sum".
    """
    if op not in ("mean", "sum"):
        raise ValueError(f"op: got {op!r}, wanted 'mean' or 'sum'")
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        if op == "mean":
            x /= dist.get_world_size()
    return x


def maybe_unpack(x: Any) -> Any:
    """The first of a tuple; anything else as it is."""
    return x[0] if isinstance(x, tuple) else x


def shift_labels(x: Tensor, shift: int) -> Tensor:
    """Labels ``[batch, tokens]`` that belong to predictions ``shift`` tokens ahead: without the first ``shift``, or the
    last ``-shift``."""
    return x[:, shift:] if shift >= 0 else x[:, :shift]


def shift_preds(x: Tensor, shift: int) -> Tensor:
    """Predictions ``[batch, tokens, ...]`` of tokens ``shift`` ahead: without the last ``shift``, or the first
    ``-shift``."""
    return x[:, : x.shape[1] - shift] if shift >= 0 else x[:, -shift:]


def pairwise(it: Iterable[T]) -> Iterable[tuple[T, T]]:
    """Each with the one behind it; ``itertools.pairwise``."""
    return itertools.pairwise(it)


@contextmanager
def handle_name_conflicts() -> Iterator[None]:
    """Say in an ``OSError`` of ``from_pretrained`` that a folder here may be named as the model is.

    Raises:
        RuntimeError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{error} (is there a folder in the current one that has the name of the model on the hub?)"
        ) from error


def pytree_flatten(tree: Any) -> Iterable[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from pytree_flatten(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from pytree_flatten(value)


def pytree_map(func: Callable[[Tensor], Any], tree: TreeType, strict: bool = True) -> TreeType:
    """The tree with ``func`` of each of its tensors.

    Args:
        func: of a tensor.
        tree: nested dicts, lists and tuples; named ones stay so.
        strict: refuse what is no tensor; False leaves it as it is.

    Raises:
        TypeError: something in it is no tensor.
    """
    found: Any = tree
    if isinstance(tree, Tensor):
        found = func(tree)
    elif isinstance(tree, dict):
        found = {key: pytree_map(func, value, strict) for key, value in tree.items()}
    elif isinstance(tree, (list, tuple)):
        items = [pytree_map(func, value, strict) for value in tree]
        found = type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    elif strict:
        raise TypeError(f"tree: got a {type(tree).__name__} in it, wanted tensors; strict=False leaves it as it is")
    return found


def pytree_cat(trees: Sequence[TreeType], dim: int = 0) -> TreeType:
    """One tree of trees that are alike, whose tensors are put one after the other along ``dim``.

    Raises:
        TypeError: they are not alike.
        ValueError: there are none.
    """
    return _joined(trees, lambda parts: torch.cat(parts, dim))


def pytree_stack(trees: Sequence[TreeType], dim: int = 0) -> TreeType:
    """One tree of trees that are alike, whose tensors are stacked along a new ``dim``.

    Raises:
        TypeError: they are not alike.
        ValueError: there are none.
    """
    return _joined(trees, lambda parts: torch.stack(parts, dim))


def _joined(trees: Sequence[TreeType], join: Callable[[list[Tensor]], Tensor]) -> TreeType:
    if not len(trees):
        raise ValueError("trees: got none, wanted one or more")
    leaves = [[*pytree_flatten(tree)] for tree in trees]
    if len({*map(len, leaves)}) > 1:
        raise TypeError(
            f"trees: got {', '.join(str(len(each)) for each in leaves)} tensors, wanted trees that are alike"
        )
    joined = iter([join([*parts]) for parts in zip(*leaves, strict=True)])
    return pytree_map(lambda _: next(joined), trees[0])


def revcumsum(x: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor the sum of it and of all behind it."""
    return [*itertools.accumulate(reversed(x), torch.add)][::-1]


def send_to_device(tree: TreeType, device: torch.device) -> TreeType:
    """The tree on ``device``."""
    return pytree_map(lambda tensor: tensor.to(device), tree)


def tensor_hash(tensor: NDArray) -> str:
    """The hash by which a lens knows the unembedding ``[vocab, d_model]`` of its model: of its corners, one digit of
    each number, so that another dtype has the same."""
    from tuned_lens_fast.nn.unembed import matrix_hash  # which imports much of the package, and this module with it

    return matrix_hash(torch.as_tensor(tensor))
