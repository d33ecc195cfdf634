"""Aliases of modules: other objects on the same tensors, to run or change while the original stays untouched.

Beside the way from hidden state to statistics: this is how a model is watched, and how its norm and head are called,
without hooks, modes or gradients of one reaching the other.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, TypeVar, cast

from torch import Tensor, nn

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


def alias(module: _Module, seen: dict[nn.Module, nn.Module] | None = None, *, own_buffers: bool = False) -> _Module:
    """A tree of modules that computes what ``module`` does, on the same tensors, without anybody's hooks.

    New tensors that are put in the original's place are seen. Submodules, modes and methods are the alias's own, so
    that swapping them leaves the original alone.

    Args:
        seen: filled with the alias of every module.
        own_buffers: gives it copies of the buffers too, for a short life: some models change theirs when they run.
    """
    seen = {} if seen is None else seen
    for original in module.modules():
        twin = seen[original] = copy.copy(original)
        # Direct, since a module's own __setattr__ may do more.
        for name in _HOOKS:
            twin.__dict__[name] = type(twin.__dict__[name])()
    copies = {id(original): twin for original, twin in seen.items()}
    for twin in list(seen.values()):
        if hasattr(twin.__dict__.get("forward"), "__deepcopy__"):
            # nnsight's, which knows its module only by a weak reference, and binds itself anew when it is copied.
            twin.__dict__["forward"] = copy.deepcopy(twin.__dict__["forward"], copies)
        twin.__dict__["_modules"] = {n: m if m is None else seen.get(m, m) for n, m in twin._modules.items()}
        for name, value in list(twin.__dict__.items()):
            if name != "_modules":
                twin.__dict__[name] = _rebound(value, seen)
    if own_buffers:
        clones: dict[Tensor, Tensor] = {}
        for twin in seen.values():
            for buffer in twin._buffers.values():
                # Integers are not computed anew, and as quantised weights they are as large as the model.
                if buffer is not None and buffer not in clones and buffer.is_floating_point() and not buffer.is_meta:
                    clones[buffer] = buffer.detach().clone()
            twin.__dict__["_buffers"] = {n: b if b is None else clones.get(b, b) for n, b in twin._buffers.items()}
    return cast(_Module, seen[module])


def frozen_alias(module: _Module) -> _Module:
    """An alias whose state is its own: moving, casting or freezing it leaves ``module`` alone, and no gradient reaches
    the parameters of ``module``. Tensors that are later put into ``module`` are not seen.
    """
    top = alias(module, own_buffers=True)
    frozen: dict[nn.Parameter, nn.Parameter] = {}
    for twin in top.modules():
        for parameter in twin._parameters.values():
            if parameter is not None and parameter not in frozen:
                frozen[parameter] = nn.Parameter(parameter.detach(), requires_grad=False)
        twin.__dict__["_parameters"] = {n: p if p is None else frozen[p] for n, p in twin._parameters.items()}
    return top


def _rebound(value: Any, seen: dict[nn.Module, nn.Module]) -> Any:
    """``value`` with the aliases in place of the modules it refers to: accelerate keeps such in instances."""
    if isinstance(value, nn.Module):
        return seen.get(value, value)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, seen.get(value.__self__, value.__self__))
    if isinstance(value, functools.partial):
        return functools.partial(
            _rebound(value.func, seen),
            *(_rebound(argument, seen) for argument in value.args),
            **{name: _rebound(argument, seen) for name, argument in value.keywords.items()},
        )
    if type(value) in (list, tuple) and any(isinstance(item, nn.Module) for item in value):
        return type(value)(_rebound(item, seen) for item in value)
    if type(value) is dict and any(isinstance(item, nn.Module) for item in value.values()):
        return {key: _rebound(item, seen) for key, item in value.items()}
    return value
