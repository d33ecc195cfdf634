"""The fused engine for NVIDIA GPUs: kernels/ put in order, in chunks that keep to the memory budget.

Nothing of size rows x vocabulary exists. The final norm needs a whole row before the first logit, so one launch cannot
hold everything without recomputing the translator for every slice of the vocabulary: x is written once,
``[rows, d_model]``, and the vocabulary pass reads it.

To PyTorch all of it is one operator, ``tuned_lens_fast::triton_decode``: torch.compile sees no graph break. A decode
can be captured in a CUDA graph: one without a top k, and one of few rows (top_k.py's ``MOST_ROWS``), which nowhere
waits for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines import operators
from tuned_lens_fast.engines.decoding import WATCH_TILE, Engine, Reference, current
from tuned_lens_fast.engines.eager import MIN_TILE, EagerEngine, scratch_bytes
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Query, Readout, Tiling, Translator
from tuned_lens_fast.engines.state import State, Wanted
from tuned_lens_fast.engines.statistics import OF_TOKENS, asked, by_two_passes, divergences
from tuned_lens_fast.engines.tiling import empty_answer, even

MISSING: str | None = None
try:
    import triton  # noqa: F401
except ImportError as error:  # no Triton for this platform
    MISSING = f"Triton cannot be imported ({error}); pip install triton"
else:
    try:
        from tuned_lens_fast.kernels import divergence, launch, target_logits, top_k, translate, vocabulary_pass
        from tuned_lens_fast.kernels import norm as norm_kernel
        from tuned_lens_fast.kernels.logits import MASKED
    except ModuleNotFoundError as error:  # in the root of a checkout whose link to them is a file
        MISSING = f"its kernels are not beside it ({error}); run Python outside of the checkout, or install with pip -e"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: The reference's u is two products a position; more positions at once than this do not make them faster.
REFERENCE_POSITIONS = 2048
#: Tokens whose logits u takes at once, at most and where the budget allows: launching a tile of 4,096 took longer than
#: computing it for a d_model up to 2,048 on an H100.
REFERENCE_TILE = 65_536


class TritonEngine(Engine):
    """Fused Triton kernels for bf16, fp16 and fp32 on NVIDIA GPUs of compute capability 8.0 and newer.

    Products are computed in the head's dtype, the translator's in the hidden states'; 16-bit products accumulate in
    fp32, and fp32 products are exact unless ``torch.set_float32_matmul_precision`` allows tf32.
    """

    name = "triton"

    def unavailable(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        if MISSING is not None:
            return MISSING
        if dtype is not None and dtype not in DTYPES:
            return f"its kernels compute in bfloat16, float16 and float32, not in {dtype}; use engine='eager'"
        if os.environ.get("TRITON_INTERPRET") == "1" and (device is None or device.type == "cpu"):
            return None
        if device is not None and device.type != "cuda":
            return "its kernels run on NVIDIA GPUs; move model and hidden states to one, or use engine='eager'"
        if not torch.cuda.is_available():
            return "PyTorch sees no NVIDIA GPU; install one and a CUDA build of PyTorch"
        if torch.version.cuda is None:
            return "this build of PyTorch is not for NVIDIA GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the GPU's compute capability is {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
        return None

    def plan(
        self,
        positions: int,
        hidden: torch.dtype,
        readout: Readout,
        query: Query,
        memory_budget: int,
        gradient: bool = False,
    ) -> Tiling:
        translators, norm, head = readout.translators, readout.norm, readout.head
        # fp32 after a translator, else the layers' hidden states side by side; a module's own steps are guessed.
        residual = 4 if any(translator is not None for translator in translators) else hidden.itemsize
        residual += 12 * (norm.kind == "module")
        residual = -(-residual * readout.width // head.weight.shape[1])
        cast = any(translator is not None and translator.weight.dtype != hidden for translator in translators)
        wide = torch.promote_types(torch.float32, hidden).itemsize
        tile = _tile(head, query)
        layers = max(1, len(translators))
        return plan(layers, positions, readout.width, wide, residual, cast, head, query, tile, memory_budget, gradient)

    def residual(self, hidden: Sequence[Tensor], translators: Sequence[Translator | None], tiling: Tiling) -> Tensor:
        if all(translator is None for translator in translators):
            return hidden[0] if len(hidden) == 1 else torch.cat(list(hidden))
        positions, d_model = hidden[0].shape
        residual = torch.empty(len(hidden) * positions, d_model, dtype=torch.float32, device=hidden[0].device)
        for h, translator, out in zip(hidden, translators, residual.split(positions), strict=True):
            if translator is None:
                out.copy_(h)
            else:
                h = h if h.dtype in DTYPES else h.float()
                translate.translate(h, translator.weight.to(h.dtype), translator.bias, out, _precision())
        return residual

    def normed(self, residual: Tensor, norm: Norm, head: Head) -> Tensor:
        if norm.kind == "module":
            return norm(residual.float()).to(head.weight.dtype)
        if norm.kind == "identity" and norm.factor == 1.0 and residual.dtype == head.weight.dtype:
            return residual.contiguous()
        x = torch.empty(residual.shape, dtype=head.weight.dtype, device=head.weight.device)
        return norm_kernel.normalize(residual, norm, x)

    def vocabulary_pass(self, x: Tensor, head: Head, wanted: Wanted, tiling: Tiling) -> State:
        tile = _tile(head, Query(frozenset(), top_k=wanted.top_k))
        targets = None
        if wanted.targets is not None:
            targets = target_logits.target_logits(x, head, wanted.targets.repeat(len(x) // len(wanted.targets)), tile)
        if wanted.u:
            if targets is not None:
                targets = targets.masked_fill_(targets <= MASKED.value, float("-inf"))
            return replace(self._expectation(x, head, wanted.u == "exact", tiling.tile), target=targets)
        state, group_maxima = vocabulary_pass.vocabulary_pass(
            x, head, tile, target_logits=targets, running=wanted.running, group_maxima=wanted.top_k > 0
        )  # fmt: skip
        if group_maxima is None:
            return state
        state = top_k.top_k(x, head, group_maxima, state, wanted.top_k, tile)
        return top_k.of_every_logit(x, head, state, tile) if len(x) <= tiling.all_logits else state

    def divergence_pass(
        self, x: Tensor, state: State, reference: Reference, head: Head, names: Collection[str], tiling: Tiling
    ) -> dict[str, Tensor]:
        tile = _tile(head, Query(frozenset()))
        return divergence.divergence_pass(x, reference.x, head, state, reference.state, names, tile)

    def kl_by_identity(self, x: Tensor, state: State, reference: Reference) -> Tensor:
        assert reference.u is not None
        return divergence.kl_by_identity(x, reference.x, reference.u, state, reference.state)

    def _expectation(self, x: Tensor, head: Head, exact: bool, width: int) -> State:
        """The state of rows with u, whose logits exist ``width`` tokens at a time."""
        matmul = self.matmul(head)
        rows = matmul.pack(x)

        def multiply(a: Tensor, b: Tensor) -> Tensor:
            return torch.bmm(a, b, out_dtype=torch.float32) if matmul.narrow else a.float() @ b.float()

        parts = 2 if exact and head.weight.dtype.itemsize < 4 else 1
        expectation = divergence.Expectation(x.shape[0], x.shape[1], x.device, parts)
        for tokens in divergence.tiles(head.vocab, width):
            expectation.add(matmul(rows, tokens, tokens.stop - tokens.start), head.weight[tokens], multiply)
        return expectation.state()

    def decode(self, hidden: Sequence[Tensor], readout: Readout, query: Query, memory_budget: int) -> dict[str, Tensor]:
        if readout.norm.kind == "module":  # an operator takes tensors only
            return self._decode(hidden, readout, query, memory_budget)
        answer = torch.ops.tuned_lens_fast.triton_decode(*operators.flat(hidden, readout, query), memory_budget)
        return {statistic.name: value for statistic, value in zip(asked(query), answer, strict=True)}

    def _decode(
        self, hidden: Sequence[Tensor], readout: Readout, query: Query, memory_budget: int
    ) -> dict[str, Tensor]:
        """The loop, and then the top k that the kernels leave: where a row has too many candidates, or all of them."""
        head = readout.head
        if head.weight.stride(1) != 1:
            raise ValueError("head.weight: its rows are not contiguous; the kernels read [vocab, d_model] row by row")
        served = query.top_k > 0 and top_k.serves(query.top_k, _slots(head, query))
        with current(head.weight.device):
            out = super().decode(hidden, readout, query if served else replace(query, top_k=0), memory_budget)
        unsure = out.pop("unsure", None)
        if not query.top_k or (served and (unsure is None or not unsure.any())):  # any() waits for the GPU, once
            return out
        positions = hidden[0].shape[0] if hidden else 0
        only_top = Query(frozenset(), top_k=query.top_k)
        if not served:
            out = empty_answer(len(hidden), positions, only_top, head.weight.device) | out
        for i, entry in enumerate(hidden):
            rest = torch.arange(positions, device=entry.device) if unsure is None else unsure[i].nonzero().squeeze(1)
            for at in rest.split(max(1, memory_budget // (32 * readout.width))):
                one = replace(readout, translators=readout.translators[i : i + 1])
                exact = EagerEngine().decode([entry[at]], one, only_top, memory_budget - memory_budget // 4)
                for statistic in OF_TOKENS:
                    if statistic.name in exact:
                        out[statistic.name][i, at] = exact[statistic.name][0]
        return out


def _operator(*flat: Any) -> list[Tensor]:
    hidden, readout, query, memory_budget = operators.bundled(*flat)
    answer = TritonEngine()._decode(hidden, readout, query, memory_budget)
    return [answer[statistic.name] for statistic in asked(query)]


# Registered by hand: torch.library.custom_op wraps every call in Python that costs as much as a small decode.
_LIBRARY = torch.library.Library("tuned_lens_fast", "FRAGMENT")
_LIBRARY.define(f"triton_decode({operators.SCHEMA}, int memory_budget) -> Tensor[]")
_LIBRARY.impl("triton_decode", _operator, "CUDA")
_LIBRARY.impl("triton_decode", _operator, "CPU")  # in Triton's interpreter


@torch.library.register_fake("tuned_lens_fast::triton_decode", lib=_LIBRARY)
def _answer_shapes(*flat: Any) -> list[Tensor]:
    hidden, readout, query, _ = operators.bundled(*flat)
    positions = hidden[0].shape[0] if hidden else 0
    return [*empty_answer(len(hidden), positions, query, readout.head.weight.device).values()]


def plan(
    layers: int, positions: int, hidden_width: int, wide: int, residual: int, cast: bool, head: Head, query: Query,
    tile: launch.Tile, memory_budget: int, gradient: bool = False,
) -> Tiling:  # fmt: skip
    """The largest blocks that fit.

    Args:
        hidden_width, wide: numbers in a hidden state, and bytes of one as the eager engine computes with it.
        residual: bytes an element of what is held of a row beside x while x is made.
        cast: translators have another dtype than the hidden states, so that each is cast when its layer comes.
        gradient: rows' gradients are wanted as well.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that works.
    """
    narrow, d_model = head.weight.dtype.itemsize, head.weight.shape[1]
    slots = launch.Partition.of(1, head, tile).slots
    a_row = d_model * (narrow + residual) + 128
    if query.top_k:
        a_row += 12 * query.top_k
        if top_k.serves(query.top_k, slots):
            a_row += 8 * slots + top_k.Room.of(query.top_k, tile).bytes_per_row
    if query.watch is not None:
        a_row += 12 * min(len(query.watch), WATCH_TILE)
    if gradient:  # the residual and its gradient in fp32, with what both are made of; a layer's products
        a_row += 28 * d_model
    if by_two_passes(query, head):
        a_row += 16 * (divergence.MOST_SLICES + 2)
    by_identity = "kl" in query.stats and "kl" not in by_two_passes(query, head)
    head_is_wide = narrow == 4
    a_position = 0
    if divergences(query):
        a_position = d_model * (narrow + 4 * by_identity) + 64
    fixed = 2**20 + (cast + gradient) * d_model * d_model * 4 + (layers + 16) * positions * bool(query.top_k)
    if query.watch is not None:
        fixed += min(len(query.watch), WATCH_TILE) * d_model * 8

    def state(row_count: int) -> int:
        return launch.Partition.of(row_count, head, tile).state_bytes + 64 * row_count

    z = 4 + 4 * (head.bias is not None or head.scale != 1.0)

    def of_reference(block: int, width: int) -> int:
        """While u is computed: logits with both parts of their softmax, and the products of these."""
        if not by_identity:
            return 0
        products = -(-width // divergence.SLAB) * 8 * d_model
        return fixed + block * (a_position + width * (z + 2 * narrow) + products) + head_is_wide * width * d_model * 4

    def needed(block: int, group: int, width: int) -> int:
        rows = block * group
        decode = fixed + block * a_position + rows * a_row + state(rows)
        if gradient:  # logits with their softmax in W's dtype; with a softcap, the slope and the reference's beside
            beside = narrow if head.softcap is None else 24
            products = (-(-width // divergence.SLAB) - 1) * 4 * d_model
            decode += rows * (width * (z + beside) + products) + head_is_wide * width * d_model * 4
        return max(decode, of_reference(block, width))

    # Rows that top_k.py hands back are decoded by the eager engine, with three quarters of the budget.
    again = Query(frozenset(), top_k=query.top_k)
    least = (
        -(-4 * scratch_bytes(1, min(MIN_TILE, head.vocab), hidden_width, head, again, wide) // 3) if query.top_k else 0
    )
    block = min(positions, REFERENCE_POSITIONS) if divergences(query) else positions
    group, width = layers, min(REFERENCE_TILE, head.vocab)
    while width > divergence.SLAB and of_reference(block, width) > memory_budget:
        width //= 2
    while needed(block, group, width) > memory_budget and (group > 1 or block > 1 or width > 256):
        if gradient and width > 2048:
            width //= 2
        elif group > 1:
            group = -(-group // 2)
        elif by_identity and width > 256 and width >= block:
            width //= 2
        elif block > 1:
            block = -(-block // 2)
        else:
            width //= 2
    least = max(least, needed(block, group, width) if block == 1 else 0)
    if least > memory_budget:
        raise BudgetError(memory_budget, least)
    while group < layers and needed(block, group + 1, width) <= memory_budget:
        group += 1
    scratch, few = max(least, needed(block, group, width)), 0
    if query.top_k and block * group >= layers * positions <= top_k.MOST_ROWS:
        with_logits = needed(block, group, width) + 4 * layers * positions * head.vocab
        if with_logits <= memory_budget:
            scratch, few = max(least, with_logits), layers * positions
    return Tiling(even(layers, group), even(positions, block), width, scratch, few)


def _precision() -> launch.Precision:
    """What fp32 products are made of."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tile(head: Head, query: Query) -> launch.Tile:
    """The tile that the vocabulary kernel holds on chip."""
    weight = head.weight
    tile = launch.vocabulary_tile(weight.device, weight.dtype, weight.shape[1], _precision(), query.top_k > 0)
    if weight.data_ptr() % 16 or weight.stride(0) * weight.dtype.itemsize % 16:
        tile = tile.without_tma()
    if not query.top_k:
        return tile
    row_bytes = weight.shape[1] * weight.dtype.itemsize
    return replace(tile, merged=launch.merged_tiles(head.vocab, tile, query.top_k, row_bytes))


def _slots(head: Head, query: Query) -> int:
    return launch.Partition.of(1, head, _tile(head, query)).slots
