"""Aliases of modules: other objects on the same tensors, to run or change while the original stays untouched.

Beside the way from hidden state to statistics: this is how a model is watched, and how its norm and head are called,
without hooks, modes or gradients of one reaching the other.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def alias(module: _Module, *, own_buffers: bool = False) -> _Module:
    """A tree of modules that computes what ``module`` does, on the same tensors, without anybody's hooks.

    New tensors that are put in the original's place are seen. Submodules, modes and methods are the alias's own, so
    that swapping them leaves the original alone. ``modules()`` of the two go side by side.

    Args:
        own_buffers: gives it copies of the buffers too, for a short life: some models change theirs when they run.
    """
    twins = {id(part): _twin(part) for part in module.modules()}
    memo: dict[int, Any] = dict(twins)
    for twin in twins.values():
        state = vars(twin)  # direct, since a module's own __setattr__ may do more
        for name, value in state.items():
            if name in _HOOKS:
                state[name] = type(value)()
            elif name == "forward" and hasattr(value, "__deepcopy__"):
                # nnsight's, which knows its module only by a weak reference, and binds itself anew when it is copied.
                state[name] = copy.deepcopy(value, memo)
            elif any(id(held) in twins for held in _held(value)):
                memo |= {id(held): held for held in _held(value) if id(held) not in twins}
                state[name] = copy.deepcopy(value, memo)
    if own_buffers:
        # Integers are not computed anew, and as quantised weights they are as large as the model.
        changing = (buffer for buffer in module.buffers() if buffer.is_floating_point() and not buffer.is_meta)
        clones = {id(buffer): buffer.detach().clone() for buffer in changing}
        for twin in twins.values():
            vars(twin)["_buffers"] = {name: clones.get(id(b), b) for name, b in twin._buffers.items()}
    return cast(_Module, twins[id(module)])


def frozen_alias(module: _Module) -> _Module:
    """An alias whose state is its own: moving, casting or freezing it leaves ``module`` alone, and no gradient reaches
    the parameters of ``module``. Tensors that are later put into ``module`` are not seen.
    """
    top = alias(module, own_buffers=True)
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    for twin in top.modules():
        vars(twin)["_parameters"] = {name: frozen.get(id(p), p) for name, p in twin._parameters.items()}
    return top


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) was called on ``module``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy; of a module of FSDP2 one of the class that it had before, without the pieces' hooks."""
    if not is_fully_sharded(module):
        return copy.copy(module)
    # A copy of the class that FSDP2 made would call the constructor of the one before.
    twin: nn.Module = object.__new__(type(module).__mro__[getattr(module, "_orig_cls_mro_index", 2)])
    vars(twin).update(vars(module))
    return twin


def _held(value: Any) -> Iterator[Any]:
    """What a container, partial or bound method holds, at any depth; of anything else itself."""
    if isinstance(value, types.MethodType):
        yield from _held(value.__self__)
    elif isinstance(value, functools.partial):
        yield from _held((value.func, value.args, value.keywords, vars(value)))  # the last is accelerate's
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item)
    else:
        yield value
