"""The fused engine for NVIDIA GPUs: kernels/ put in order, in chunks that keep to the memory budget.

For a block of positions: the model's own output first, where divergences want it; then groups of layers, from hidden
states to x, to statistics. Nothing of size rows x vocabulary exists. The final norm needs a whole row before the first
logit, so one launch cannot hold everything without recomputing the translator for every slice of the vocabulary: x is
written once, ``[rows, d_model]``, and the vocabulary pass reads it.

To PyTorch all of it is one operator, ``tuned_lens_fast::triton_decode``: torch.compile sees no graph break, and a
decode without top k can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.engines.eager import MIN_TILE, EagerEngine, Matmul, scratch_bytes, two_tile_stats
from tuned_lens_fast.engines.interface import BudgetError, Head, Norm, Query, Tiling, Translator
from tuned_lens_fast.engines.tiling import empty_answer, even, slices
from tuned_lens_fast.progress import report

try:
    import triton  # noqa: F401
except ImportError as error:  # no Triton for this platform
    MISSING: str | None = f"Triton cannot be imported ({error}); pip install triton"
else:
    MISSING = None
    from tuned_lens_fast.kernels import divergence, gather, launch, statistics, top_k, translate
    from tuned_lens_fast.kernels import norm as norm_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: The reference's u is two products a position; more positions at once than this do not make them faster.
REFERENCE_POSITIONS = 2048
#: Tokens whose logits u takes at once: few, since matrix units add with truncation (16,384 cost KL twice the error on
#: an H100), and not so few that launching takes longer than computing.
REFERENCE_TILE = 8192
#: TracedModel tokens whose logits exist at once.
WATCH_TILE = 1024


@dataclass(frozen=True)
class Reference:
    """The model's own output at a block of positions."""

    x: Tensor  #: [positions, d_model], what the head receives
    normaliser: Tensor  #: fp32 [2, positions]
    u: Tensor | None  #: fp32 [positions, d_model], W^T softmax(z), the head's scale included


class TritonEngine:
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
        layers: int,
        positions: int,
        hidden: torch.dtype,
        translators: Sequence[Translator | None],
        norm: Norm,
        head: Head,
        query: Query,
        memory_budget: int,
    ) -> Tiling:
        """See :class:`~tuned_lens_fast.engines.interface.Engine`."""
        # fp32 after a translator, else the layers' hidden states side by side; a module's own steps are guessed.
        residual = 4 if any(translator is not None for translator in translators) else hidden.itemsize
        residual += 12 * (norm.kind == "module")
        residual = -(-residual * norm.hidden_width(head) // head.weight.shape[1])
        cast = any(translator is not None and translator.weight.dtype != hidden for translator in translators)
        tile = _tile(head, query, _precision())
        return plan(layers, positions, head.weight.shape[1], residual, cast, head, query, tile, memory_budget)

    def decode(
        self,
        hidden: Sequence[Tensor],
        translators: Sequence[Translator | None],
        norm: Norm,
        head: Head,
        query: Query,
        memory_budget: int,
    ) -> dict[str, Tensor]:
        """See :class:`~tuned_lens_fast.engines.interface.Engine`."""
        if norm.kind == "module":  # an operator takes tensors only
            return _decode(hidden, translators, norm, head, query, memory_budget)
        answer = torch.ops.tuned_lens_fast.triton_decode(
            list(hidden),
            [None if translator is None else translator.weight for translator in translators],
            [None if translator is None else translator.bias for translator in translators],
            norm.kind, norm.weight, norm.bias, norm.eps, norm.unit_offset, norm.factor,
            head.weight, head.bias, head.scale, head.softcap,
            ",".join(sorted(query.stats)), query.targets, query.reference, query.watch, query.top_k, memory_budget,
        )  # fmt: skip
        return dict(zip(_names(query), answer, strict=True))


def _names(query: Query) -> list[str]:
    """The statistics in the order in which the operator returns them."""
    names = ["lse", *sorted(query.stats)]
    if query.top_k:
        names += ["top_ids", "top_log_probs"]
    return names if query.watch is None else [*names, "watch_log_probs"]


def _operator(
    hidden: Sequence[Tensor],
    translator_weights: Sequence[Tensor | None],
    translator_biases: Sequence[Tensor | None],
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_unit_offset: bool,
    norm_factor: float,
    head_weight: Tensor,
    head_bias: Tensor | None,
    head_scale: float,
    head_softcap: float | None,
    stats: str,
    targets: Tensor | None,
    reference: Tensor | None,
    watch: Tensor | None,
    top_k: int,
    memory_budget: int,
) -> list[Tensor]:
    query = Query(frozenset(filter(None, stats.split(","))), targets, reference, watch, top_k)
    answer = _decode(
        hidden,
        [
            None if weight is None else Translator(weight, bias)
            for weight, bias in zip(translator_weights, translator_biases, strict=True)
        ],
        Norm(norm_kind, norm_weight, norm_bias, norm_eps, norm_unit_offset, None, norm_factor),  # type: ignore[arg-type]
        Head(head_weight, head_bias, head_scale, head_softcap),
        query,
        memory_budget,
    )
    return [answer[name] for name in _names(query)]


# Registered by hand: torch.library.custom_op wraps every call in Python that costs as much as a small decode.
_LIBRARY = torch.library.Library("tuned_lens_fast", "FRAGMENT")
_LIBRARY.define("triton_decode" + torch.library.infer_schema(_operator, mutates_args=()))
_LIBRARY.impl("triton_decode", _operator, "CUDA")
_LIBRARY.impl("triton_decode", _operator, "CPU")  # in Triton's interpreter


@torch.library.register_fake("tuned_lens_fast::triton_decode", lib=_LIBRARY)
def _answer_shapes(hidden: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *_, head_weight, _, _, _, stats, targets, reference, watch, top_k, _ = rest
    query = Query(frozenset(filter(None, stats.split(","))), targets, reference, watch, top_k)
    answer = empty_answer(len(hidden), hidden[0].shape[0] if hidden else 0, query, head_weight.device)
    return [answer[name] for name in _names(query)]


def plan(
    layers: int, positions: int, d_model: int, residual: int, cast: bool, head: Head, query: Query,
    tile: launch.Tile, memory_budget: int,
) -> Tiling:  # fmt: skip
    """The largest blocks that fit.

    Args:
        residual: bytes an element of what is held of a row beside x while x is made.
        cast: translators have another dtype than the hidden states, so that each is cast when its layer comes.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that works.
    """
    wide = head.weight.dtype.itemsize
    slots = statistics.key_slots(head.vocab, tile)
    a_row = d_model * (wide + residual) + 128
    if query.top_k:
        a_row += 12 * query.top_k
        if top_k.serves(query.top_k, slots):
            a_row += 8 * slots + top_k.Room.of(query.top_k, tile).bytes_per_row
    if query.watch is not None:
        a_row += 12 * min(len(query.watch), WATCH_TILE)
    if two_tile_stats(query, head):
        a_row += 16 * (divergence.MOST_SLICES + 2)
    by_identity = "kl" in query.stats and head.softcap is None
    head_is_wide = wide == 4
    a_position = 0
    if query.divergences:
        a_position = d_model * (wide + 4 * by_identity) + 64
    fixed = 2**20 + cast * d_model * d_model * 4 + (layers + 16) * positions * bool(query.top_k)
    if query.watch is not None:
        fixed += min(len(query.watch), WATCH_TILE) * d_model * 8

    def state(row_count: int) -> int:
        blocks = -(-row_count // tile.block_rows)
        whole = head.vocab // (8 * tile.members)
        band = launch.row_band(d_model, wide, tile)
        splits = launch.vocabulary_splits(blocks, whole, launch.processors(head.weight.device), band) if whole else 0
        return 16 * row_count * ((1 + tile.overlapped) * splits + 2)

    def needed(block: int, group: int, width: int) -> int:
        rows = block * group
        decode = fixed + block * a_position + rows * a_row + state(rows)
        if not by_identity:
            return decode
        # While u is computed: logits with both parts of their softmax, and the products of these.
        logits = block * width * (4 + 4 * (head.bias is not None or head.scale != 1.0) + 2 * wide)
        return max(decode, fixed + block * (a_position + 8 * d_model) + logits + head_is_wide * width * d_model * 4)

    # Rows that top_k.py hands back are decoded by the eager engine, with three quarters of the budget.
    again = Query(frozenset(), top_k=query.top_k)
    least = -(-4 * scratch_bytes(1, min(MIN_TILE, head.vocab), d_model, head, again, 4) // 3) if query.top_k else 0
    block = min(positions, REFERENCE_POSITIONS) if query.divergences else positions
    group, width = layers, min(REFERENCE_TILE, head.vocab)
    while needed(block, group, width) > memory_budget and (group > 1 or block > 1 or width > 256):
        if group > 1:
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
    return Tiling(even(layers, group), even(positions, block), width, max(least, needed(block, group, width)))


def _precision() -> str:
    """What fp32 products are made of."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tile(head: Head, query: Query, precision: str) -> launch.Tile:
    """The tile that the vocabulary kernel holds on chip."""
    weight = head.weight
    tile = launch.statistics_tile(weight.device, weight.dtype, weight.shape[1], precision, query.top_k > 0)
    if head.weight.data_ptr() % 16 or head.weight.stride(0) * head.weight.dtype.itemsize % 16:
        tile = tile.without_tma()
    return replace(tile, merged=launch.merged_tiles(head.vocab, tile, query.top_k)) if query.top_k else tile


def _decode(
    hidden: Sequence[Tensor],
    translators: Sequence[Translator | None],
    norm: Norm,
    head: Head,
    query: Query,
    memory_budget: int,
) -> dict[str, Tensor]:
    layers, positions = len(hidden), hidden[0].shape[0] if hidden else 0
    device, d_model = head.weight.device, head.weight.shape[1]
    out = empty_answer(layers, positions, query, device)
    if not layers or not positions:
        return out
    if head.weight.stride(1) != 1:
        raise ValueError("head.weight: its rows are not contiguous; the kernels read [vocab, d_model] row by row")
    precision = _precision()
    tile = _tile(head, query, precision)
    served = top_k.serves(query.top_k, statistics.key_slots(head.vocab, tile)) if query.top_k else False
    tiling = TritonEngine().plan(layers, positions, hidden[0].dtype, translators, norm, head, query, memory_budget)
    overflow = torch.empty(layers, positions, dtype=torch.bool, device=device) if served else None

    for block in slices(positions, tiling.positions):
        reference = None
        if query.divergences:
            assert query.reference is not None
            reference = _reference(query.reference[block], head, query, tile, precision, tiling.tile)
        for group in slices(layers, tiling.layers):
            members = range(group.start, group.stop)
            entering = [hidden[i][block] for i in members]
            x = _head_input(entering, [translators[i] for i in members], norm, head, precision)
            found = _rows(x, block, head, query, tile, precision, reference, served)
            if overflow is not None:
                overflow[group, block] = found.pop("overflow").view(len(members), -1)
            for name, value in found.items():
                out[name][group, block] = value.unflatten(0, (len(members), -1))
            report(x.shape[0])
            del x, found

    if query.top_k:
        only_top = Query(frozenset(), top_k=query.top_k)
        # any() waits for the GPU, once a decode.
        for i in range(layers if overflow is None or overflow.any() else 0):
            rest = torch.arange(positions, device=device) if overflow is None else overflow[i].nonzero().squeeze(1)
            for at in rest.split(max(1, memory_budget // (32 * d_model))):
                exact = EagerEngine().decode(
                    [hidden[i][at]], [translators[i]], norm, head, only_top, memory_budget - memory_budget // 4
                )
                for name in ("top_ids", "top_log_probs"):
                    out[name][i, at] = exact[name][0]
    return out


def _head_input(
    hidden: list[Tensor], translators: list[Translator | None], norm: Norm, head: Head, precision: str
) -> Tensor:
    """x = norm(h + A h + c), ``[layers * positions, d_model]`` in the head's dtype."""
    if all(translator is None for translator in translators):
        residual = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
    else:
        positions, d_model = hidden[0].shape
        residual = torch.empty(len(hidden) * positions, d_model, dtype=torch.float32, device=head.weight.device)
        for h, translator, out in zip(hidden, translators, residual.split(positions), strict=True):
            if translator is None:
                out.copy_(h)
            else:
                h = h if h.dtype in DTYPES else h.float()
                translate.translate(h, translator.weight.to(h.dtype), translator.bias, out, precision)
    if norm.kind == "module":
        return norm(residual.float()).to(head.weight.dtype)
    if norm.kind == "identity" and norm.factor == 1.0 and residual.dtype == head.weight.dtype:
        return residual.contiguous()
    x = torch.empty(residual.shape, dtype=head.weight.dtype, device=head.weight.device)
    return norm_kernel.normalize(residual, norm, x)


def _rows(
    x: Tensor,
    block: slice,
    head: Head,
    query: Query,
    tile: launch.Tile,
    precision: str,
    reference: Reference | None,
    served: bool,
) -> dict[str, Tensor]:
    """Every statistic of rows x ``[layers * positions, d_model]``, rows first, and ``overflow``: see top_k.py."""
    rows = x.shape[0]
    parts = (head.weight, head.bias, head.scale, head.softcap)
    stats = query.stats
    targets = logits = None
    if query.targets is not None and stats & {"log_prob", "rank"}:
        targets = query.targets[block].repeat(rows // (block.stop - block.start))
        logits = gather.target_logits(x, *parts, targets, tile, precision)
    state = statistics.vocabulary_statistics(
        x, *parts, tile, targets=targets, target_logits=logits, entropy="entropy" in stats, rank="rank" in stats,
        max_prob="max_prob" in stats, keys=served, precision=precision,
    )  # fmt: skip
    found = {"lse": state.normaliser.sum(0)}
    for name in ("log_prob", "rank", "entropy", "max_prob"):
        if name in stats:
            found[name] = getattr(state, name)
    if served:
        assert state.keys is not None
        found["top_ids"], found["top_log_probs"], found["overflow"] = top_k.top_k(
            x, *parts, state.keys, state.normaliser, query.top_k, tile
        )
    if query.watch is not None:
        watched = torch.empty(rows, len(query.watch), dtype=torch.float32, device=x.device)
        matmul = Matmul(head, x.dtype)
        for at in slices(len(query.watch), WATCH_TILE):
            z = matmul(matmul.round(x), query.watch[at], WATCH_TILE)
            torch.sub(z.sub_(state.normaliser[0].unsqueeze(1)), state.normaliser[1].unsqueeze(1), out=watched[:, at])
        found["watch_log_probs"] = watched
    if reference is not None:
        if reference.u is not None:
            found["kl"] = divergence.kl_by_identity(x, reference.x, reference.u, state.normaliser, reference.normaliser)
        walked = two_tile_stats(query, head)
        if walked:
            found |= divergence.divergence_pass(
                x, reference.x, *parts, state.normaliser, reference.normaliser, walked, tile, precision
            )
    return found


def _reference(reference: Tensor, head: Head, query: Query, tile: launch.Tile, precision: str, width: int) -> Reference:
    """The normaliser of the model's own output and, for KL by the identity, u = W^T softmax(z) * scale."""
    x = reference.to(head.weight.dtype).contiguous()
    parts = (head.weight, head.bias, head.scale, head.softcap)
    if "kl" not in query.stats or head.softcap is not None:
        return Reference(x, statistics.vocabulary_statistics(x, *parts, tile, precision=precision).normaliser, None)
    matmul = Matmul(head, x.dtype)
    operand = matmul.round(x)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32) if matmul.narrow else a.float() @ b.float()

    expectation = divergence.Expectation(*x.shape, x.device)
    for tokens in slices(head.vocab, width):
        expectation.add(matmul(operand, tokens, width), head.weight[tokens], multiply)
    u, normaliser = expectation.normalised()
    return Reference(x, normaliser, u.mul_(head.scale))
