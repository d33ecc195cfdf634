"""The vocabulary pass of Hopper GPUs for few features: the statistics of one tile under the product of the next.

Where d_model is small, a tile's statistics take a good part of the time of its product, and in vocabulary_pass.py the
matrix units rest meanwhile. Here two groups of four warps take turns: one multiplies a tile while the other has its
statistics to do. A ninth warp has the copy engine bring the tiles of W, in the order in which the two will want them,
into a ring of stages that each group frees as it goes. A barrier knows but the parity of its phase, so a group may wait
for a stage only once the tile before its own has come: the other group hands it the turn.

All of the program's rows of x stay in shared memory, so that W alone streams: at the matrix units' full rate 32 bytes a
clock and processor for tiles of 128 x 128. Both operands would be 64; the 128 x 256 tiles of vocabulary_pass.py ask for
48 and drew 8 TB/s from L2 on an H100, some 38. Room for x and two stages is what limits d_model.

It has compiled for Hopper, and its order of events has run in software (tests/kernels/partitions.py), but not on a GPU.
So no built-in tile asks for it: search.py tries it where --overlapped wants that, and an entry of its file may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tuned_lens_fast.kernels.launch import Partition, Tile, head_arguments
from tuned_lens_fast.kernels.logits import EMPTY, MASKED
from tuned_lens_fast.kernels.running_state import add_tile, item_of, store_state

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: Arguments that change from launch to launch: one compiled kernel serves them all.
_SIZES = ["R", "V", "groups", "tiles", "row_blocks", "band", "splits", "last_splits", "slots8"]
#: Triton 3.6 calls it async_copy_global_to_shared.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _in_layout_of(value, like):
    """``value`` in the layout of ``like``."""
    return gl.convert_layout(value, like.type.layout)


@gluon.jit
def _alternating(start, stop, MERGED: gl.constexpr):
    """Of the tiles [start, stop), slots of MERGED go to the groups in turn; how many pairs of slots are whole, and how
    many tiles the groups have in the last, where the first is served first."""
    pairs = (stop - start) // (2 * MERGED)
    rest = (stop - start) % (2 * MERGED)
    return pairs, gl.minimum(rest, MERGED), gl.maximum(rest - MERGED, 0)


@gluon.jit
def _copy(
    x,  # descriptor of [R, D]
    w,  # that of [MEMBERS, groups, D]
    x_here,  # barrier
    filled,  # barriers [STAGES], as free
    free,
    x_rows,  # shared [STEPS, BM, BK]
    ring,  # shared [STAGES, MEMBERS, 8, BK]
    row, start, stop,
    BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, MERGED: gl.constexpr,
):  # fmt: skip
    """The ninth warp: brings x, and the tiles of W in the order in which the groups want them."""
    mbarrier.expect(x_here, STEPS * x.block_type.nbytes)
    for k in range(STEPS):
        _load_tile(x, [row, k * BK], x_here, x_rows.index(k))
    pairs, _, last = _alternating(start, stop, MERGED)
    stage = 0
    phase = 1
    for n in range(stop - start):
        within = n % (2 * MERGED)
        in_turn = gl.where(n // (2 * MERGED) < pairs, MERGED, last)  # of the second group's slot
        alternate = within < 2 * in_turn
        who = gl.where(alternate, within % 2, 0)
        part = gl.where(alternate, within // 2, within - in_turn)
        tile = start + n - within + who * MERGED + part
        for k in range(STEPS):
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(filled.index(stage), w.block_type.nbytes)
            _load_tile(w, [0, tile * 8, k * BK], filled.index(stage), ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _take_turns(
    WHO: gl.constexpr,
    target_logits,  # fp32 [R]
    state,  # fp32, see running_state.py
    group_maxima,  # fp32 [R, 2, slots]
    x_here,  # barrier
    filled,  # barriers [STAGES], as free
    free,
    turn,  # barriers [2]
    x_rows,  # shared [STEPS, BM, BK]
    ring,  # shared [STAGES, MEMBERS, 8, BK]
    block, start, stop, split, R, V, groups, row_blocks, band, splits, last_splits, slots8, place_mask,
    bias,  # [V]
    scale, softcap,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    MERGED: gl.constexpr, BIAS: gl.constexpr, SCALE: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr,
    RANK: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    """One of the two groups of warps: multiplies its tiles, and takes their statistics while the other multiplies."""
    MEMBERS: gl.constexpr = BN // 8
    row = block * BM
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BN, 16])
    column = gl.arange(0, BN, gl.SliceLayout(0, logits))
    nothing = gl.zeros([BM, BN], gl.float32, logits)
    grouped: gl.constexpr = nothing.reshape([BM, MEMBERS, 8]).type.layout
    a_group: gl.constexpr = gl.SliceLayout(1, grouped)
    rows = row + gl.arange(0, BM, gl.SliceLayout(1, a_group))
    row_mask = rows < R
    target_logit = gl.zeros([BM], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, grouped)))
    if RANK:
        own = row + gl.arange(0, BM, gl.SliceLayout(1, gl.SliceLayout(2, grouped)))
        target_logit = gl.load(target_logits + own, mask=own < R, other=0.0)
    m = gl.full([BM, 8], EMPTY, gl.float32, a_group)
    s = gl.zeros([BM, 8], gl.float32, a_group)
    t = gl.zeros([BM, 8], gl.float32, a_group)
    above = gl.zeros([BM, 8], gl.float32, a_group)
    largest = gl.full([BM, 8], MASKED, gl.float32, a_group)
    first = largest
    second = largest

    pairs, first_last, second_last = _alternating(start, stop, MERGED)
    mbarrier.wait(x_here, 0)
    for n in range(pairs * MERGED + (second_last if WHO else first_last)):
        pair = n // MERGED
        part = n % MERGED
        slot = start // MERGED + 2 * pair + WHO
        tile = slot * MERGED + part
        # Where the ring has it: after its own group's tiles, and those of the other that come before.
        in_turn = gl.where(pair < pairs, MERGED, second_last)
        step = (pair * (2 * MERGED) + part + gl.minimum(part + WHO, in_turn)) * STEPS
        stage = step % STAGES
        phase = (step // STAGES) & 1
        before = stage
        # Only the first group's last slot may have tiles that follow one of its own.
        if pair < pairs or part <= in_turn:
            mbarrier.wait(turn.index(WHO), (n & 1) ^ (1 - WHO))
        acc = nothing
        for k in range(STEPS):
            mbarrier.wait(filled.index(stage), phase)
            weight = ring.index(stage).reshape([BN, BK]).permute((1, 0))
            acc = warpgroup_mma(x_rows.index(k), weight, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(free.index(before), count=1, pred=k > 0)  # the product before this one is done
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(free.index(before), count=1)
        token = tile * 8 + column % 8 + (column // 8) * groups
        m, s, t, above, largest, first, second = add_tile(
            acc, m, s, t, above, largest, first, second, target_logit, bias, token, token < V, column // 8, part, slot,
            group_maxima, rows, row_mask, gl.arange(0, 8, gl.SliceLayout(0, a_group)), slots8 * 8,
            scale, softcap, place_mask, BM, BN, MEMBERS, MERGED, BIAS, SCALE, SOFTCAP, False, ENTROPY, RANK, TOP,
            _in_layout_of,
        )  # fmt: skip
    store_state(
        m, s, t, above, state, block, rows, row_mask, 2 * split + WHO, R, row_blocks, band, splits, last_splits,
        BM, 2, ENTROPY, RANK,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _overlapped(
    x,  # descriptor of [R, D]
    w,  # that of [MEMBERS, groups, D]
    target_logits,  # fp32 [R]
    state,  # fp32, see running_state.py
    group_maxima,  # fp32 [R, 2, slots]
    R, V, groups, tiles, row_blocks, band, splits, last_splits, slots8, place_mask,
    bias,  # [V]
    scale, softcap,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    MERGED: gl.constexpr, BIAS: gl.constexpr, SCALE: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr,
    RANK: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    """Two parts of the state of a block of rows: a program's two groups of warps share its slice of the vocabulary."""
    block, start, stop, split = item_of(gl.program_id(0), tiles, row_blocks, band, splits, last_splits, MERGED)
    x_rows = gl.allocate_shared_memory(x.dtype, [STEPS, BM, BK], x.layout)
    ring = gl.allocate_shared_memory(w.dtype, [STAGES, BN // 8, 8, BK], w.layout)
    x_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(x_here, count=1)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    # Written out twice: Gluon puts no tuples together that hold constants and what is not there.
    gl.warp_specialize(
        [
            (_take_turns, (0, target_logits, state, group_maxima, x_here, filled, free, turn, x_rows, ring, block,
                           start, stop, split, R, V, groups, row_blocks, band, splits, last_splits, slots8, place_mask,
                           bias, scale, softcap, BM, BN, BK, STEPS, STAGES, MERGED, BIAS, SCALE, SOFTCAP, ENTROPY, RANK,
                           TOP)),
            (_take_turns, (1, target_logits, state, group_maxima, x_here, filled, free, turn, x_rows, ring, block,
                           start, stop, split, R, V, groups, row_blocks, band, splits, last_splits, slots8, place_mask,
                           bias, scale, softcap, BM, BN, BK, STEPS, STAGES, MERGED, BIAS, SCALE, SOFTCAP, ENTROPY, RANK,
                           TOP)),
            (_copy, (x, w, x_here, filled, free, x_rows, ring, block * BM, start, stop, BK, STEPS, STAGES, MERGED)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def shared_bytes(tile: Tile, d_model: int) -> int:
    """Of a program: the rows of x, the ring of stages and the barriers, for 16-bit operands."""
    steps = triton.cdiv(d_model, tile.block_depth)
    return 2 * tile.block_depth * (steps * tile.block_rows + tile.stages * tile.block_vocab) + 8 * (3 + 2 * tile.stages)


def descriptors(x: Tensor, head: Head, tile: Tile, partition: Partition) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What the copy engine is told of x, a block of rows at a time, and of W, seen as in vocabulary_pass.py."""
    weight, depth, groups = head.weight, tile.block_depth, partition.groups
    stride = weight.stride(0)
    flat, deep = (gl.NVMMASharedLayout(2 * depth, element_bitwidth=16, rank=rank) for rank in (2, 3))
    a = TensorDescriptor(x, [*x.shape], [x.stride(0), 1], [tile.block_rows, depth], flat)
    shape, block = [tile.members, groups, x.shape[1]], [tile.members, 8, depth]
    return a, TensorDescriptor(weight, shape, [groups * stride, stride, 1], block, deep)


def whole_tiles(
    x: Tensor, head: Head, tile: Tile, partition: Partition,
    target_logits: Tensor | None, state: Tensor, group_maxima: Tensor | None, asked: dict[str, bool],
) -> None:  # fmt: skip
    """The statistics of the vocabulary's whole tiles.

    Args:
        x: ``[rows, d_model]``, as the head's weight of one 16-bit dtype, rows 16 bytes apart or a multiple.
        target_logits: fp32 ``[rows]`` where a rank is wanted.
        state: fp32, room for the partition's ``states``, two a row and slice.
        group_maxima: fp32 ``[rows, 2, slots]`` where a top k is wanted.
        asked: ENTROPY, RANK and TOP of the kernel.

    Raises:
        ValueError: the tile is none that this kernel can take.
    """
    if tile.stages < 2 or tile.warps != 8:
        raise ValueError(f"tile: got {tile}, wanted 8 warps and 2 stages at least of one that is overlapped")
    depth = tile.block_depth
    _overlapped[(partition.items,)](
        *descriptors(x, head, tile, partition), target_logits, state, group_maxima,
        len(x), head.vocab, partition.groups, *partition.arguments(), partition.slots // 8, partition.place_mask,
        **head_arguments(head),
        BM=tile.block_rows, BN=tile.block_vocab, BK=depth, STEPS=triton.cdiv(x.shape[1], depth), STAGES=tile.stages,
        MERGED=tile.merged, **asked, num_warps=tile.warps // 2, enable_fp_fusion=True,
    )  # fmt: skip
