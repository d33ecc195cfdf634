"""A model's tensors wherever they lie: spread over ranks, offloaded, quantised, on several devices.

Between a model and what describes its end: others split and place models, and here is looked up where a tensor is. None
of the libraries that do it is imported; their objects are told by their parts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuned_lens_fast.models.alias import alias, frozen_alias, is_fully_sharded
from tuned_lens_fast.models.comparison import close

#: Dtypes of a matrix that engines take tiles of.
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Unit vectors that a quantised head is asked for at once.
_UNIT_VECTORS = 256


def is_spread(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which each rank has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def plain(tensor: Tensor) -> Tensor:
    """``tensor`` as one that is whole on this rank; itself, without a gradient, where it is.

    The parts of a ``DTensor`` are gathered, so that all of its ranks have to call this.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def stored(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer ``name`` of ``module``, from where accelerate keeps it if it is offloaded."""
    tensor = {**module._buffers, **module._parameters}[name]
    assert tensor is not None
    hook = _offloading(module)
    return hook.weights_map[name] if tensor.is_meta and hook is not None else tensor


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its tensors are, or are brought to when it is called."""
    hook = _offloading(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where a model's modules compute, each device once."""
    own = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return [device for device in dict.fromkeys(map(execution_device, own)) if device.type != "meta"]


def check_split(model: Any) -> None:
    """Refuse models whose weights nobody but what split them can reach.

    Raises:
        NotImplementedError: one in FSDP1, or a stage of a pipeline. Every rank of it raises the same.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and isinstance(model, nn.Module):
        from torch.distributed.fsdp import FullyShardedDataParallel as fsdp1

        if any(isinstance(module, fsdp1) for module in model.modules()):
            raise NotImplementedError(
                "model: it is in FullyShardedDataParallel (FSDP1), which keeps its weights in flat pieces; shard it "
                "with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    of_torch = any(kind.__module__.startswith("torch.distributed.pipelining") for kind in type(model).__mro__)
    if of_torch or hasattr(model, "_pp_stage"):
        raise NotImplementedError(
            "model: it is a stage of a pipeline (PipelineStage), and a lens reads all blocks and the head; split it by "
            "tensor parallelism (tp_plan), FSDP2 or device_map"
        )


def fully_sharded(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules of FSDP2 outside of the blocks; none where the model is not in FSDP2."""
    inside = {part for block in blocks for part in block.modules()}
    return [part for part in model.modules() if is_fully_sharded(part) and part not in inside]


@contextmanager
def unsharded(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, the parameters of these modules of FSDP2 are whole. All ranks have to enter."""
    for part in parts:
        part.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for part in parts:
            part.reshard()  # type: ignore[operator]


class Resident:
    """One of a model's modules, its tensors plain and on one device wherever the model's own lie.

    The module itself where they are so already. Else a frozen copy that computes the same, made when it is asked for,
    and anew once the model's tensors have changed, as their version counters tell: by an optimiser or ``copy_``, not by
    writing to ``.data``. All ranks of a split model have to ask for it alike.
    """

    def __init__(
        self, module: nn.Module, sharded: Sequence[nn.Module] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            module: the model's.
            sharded: those modules of FSDP2 that hold its parameters.
            dtype: what a quantised linear layer is called with.
        """
        self.module = module
        self._sharded = sharded
        self._dtype = dtype
        self._copy: nn.Module | None = None
        self._sources: dict[tuple[nn.Module, str], Tensor] = {}
        self._versions: list[Any] = []

    def __call__(self, device: torch.device | None = None) -> nn.Module:
        """The module, on ``device`` or else where it computes.

        Raises:
            NotImplementedError: a quantised linear layer is more than a matrix and a bias.
        """
        places = [t.device for t in (*self.module.parameters(), *self.module.buffers())]
        if not self.apart and (device is None or all(place == device for place in places)):
            return self.module
        versions = [device, *self._tensor_versions()]
        if self._copy is None or versions != self._versions:
            # The old one goes first: a head may be as large as what is left of the memory.
            self._copy = None
            with torch.no_grad(), unsharded(self._sharded):
                self._copy = self._copied(device or execution_device(self.module))
            self._versions = versions
        return self._copy

    def forget(self) -> None:
        """Let go of the copy, where there is one, until it is asked for again."""
        self._copy = None

    def __reduce__(self) -> tuple:
        """As a plain module, which works alone."""
        module = self()
        hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
        return Resident, (self._copied(execution_device(module)) if hooked else module,)

    @functools.cached_property
    def apart(self) -> bool:
        """Whether the module's own tensors cannot be read as they are."""
        return bool(self._sharded) or any(
            is_spread(tensor)
            or (tensor.is_meta and _offloading(part) is not None)
            or (name == "weight" and part is self.module and _is_quantised(part, tensor))
            for part, name, tensor in _tensors(self.module)
        )

    def _tensor_versions(self) -> Iterator[Any]:
        for part, name, tensor in _tensors(self.module):
            # FSDP2 puts whole parameters in the place of its own, and takes them away again.
            if not self._sharded or is_spread(tensor) or (part, name) not in self._sources:
                self._sources[part, name] = tensor
            source = self._sources[part, name]
            yield id(source), *(0 if t.is_inference() else t._version for t in (source, _local(source)))

    def _copied(self, device: torch.device) -> nn.Module:
        module = self.module
        if isinstance(module, nn.Linear) and _is_quantised(module, stored(module, "weight")):
            return _dequantised(module, self._dtype).to(device)
        copy = frozen_alias(module)
        for part, twin in zip(module.modules(), copy.modules(), strict=True):
            for kind in ("_parameters", "_buffers"):
                own = {n: plain(stored(part, n)).to(device) for n, t in vars(part)[kind].items() if t is not None}
                if self._sharded:
                    own = {n: t.clone() for n, t in own.items()}  # FSDP2 takes the memory back
                if kind == "_parameters":
                    own = {n: nn.Parameter(t, requires_grad=False) for n, t in own.items()}
                vars(twin)[kind] = {**vars(twin)[kind], **own}
            _unhook(twin)
        return copy


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; another tensor itself."""
    return tensor._local_tensor if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer of a tree of modules, and the module that it is of."""
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield part, name, tensor


def _offloading(module: nn.Module) -> Any:
    """Accelerate's hook that brings the tensors of ``module`` when it is called; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((h for h in hooks if getattr(h, "offload", False) and getattr(h, "weights_map", None)), None)


def _unhook(module: nn.Module) -> None:
    """Take away what accelerate and tensor parallelism put around the call of a module on tensors of its own."""
    state = vars(module)
    forward = state.get("forward")
    of_accelerate = "_old_forward" in state and isinstance(forward, functools.partial)
    if of_accelerate or getattr(forward, "__name__", "") == "tp_forward":
        del state["forward"]
    for name in ("_hf_hook", "_old_forward"):
        state.pop(name, None)


def _is_quantised(module: nn.Module, weight: Tensor) -> bool:
    """Whether the weight of a linear layer is something else than a matrix of numbers."""
    if not isinstance(module, nn.Linear):
        return False
    weight = _local(weight)
    return type(weight.data) not in (Tensor, nn.Parameter) or weight.dtype not in _PLAIN_DTYPES


def _dequantised(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A quantised linear layer as a plain one: its matrix is what it makes of the unit vectors.

    Whatever the format, one of them brings the numbers of a column, each once.

    Raises:
        NotImplementedError: the layer does more than to multiply, such as rounding what it is given.
    """
    twin = alias(linear).eval()
    device = execution_device(linear)
    width = linear.in_features
    bias = None if linear.bias is None else plain(stored(linear, "bias")).to(device)
    vars(twin)["_parameters"] = {**twin._parameters, "bias": None}
    matrix = None
    for start in range(0, width, _UNIT_VECTORS):
        rows = torch.arange(start, min(start + _UNIT_VECTORS, width), device=device)
        columns = twin(F.one_hot(rows, width).to(dtype))
        if matrix is None:
            matrix = torch.empty(columns.shape[1], width, dtype=columns.dtype, device=columns.device)
        matrix[:, start : start + _UNIT_VECTORS] = columns.T
    assert matrix is not None
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    if not close(F.linear(x.to(matrix.dtype), matrix), twin(x)):
        raise NotImplementedError(
            f"model: its head, a quantised {type(linear).__name__}, gives other logits than any matrix; leave it "
            f"unquantised"
        )
    plain_linear = nn.Linear(width, len(matrix), bias=False, device="meta")
    plain_linear.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        plain_linear.bias = nn.Parameter(bias, requires_grad=False)
    return plain_linear
