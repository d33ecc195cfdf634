"""The vocabulary pass of Hopper GPUs for many features: persistent, and two groups of warps a tile apart in time.

Where d_model is large, a product fills the matrix units but for its ends: in vocabulary_pass.py loads wait for a
program to start, and all eight warps have their statistics to do at once while the matrix units rest. Here a program
stays on its processor and takes item after item (launch.py), so that the loads of the next run under the statistics of
the last tile of this one. Two groups of four warps own half of a tile's rows each, of operands that a ninth warp has
the copy engine bring into a ring of stages; a stage is free once both have multiplied it.

In step, both groups would end every tile together. So the second may begin the last LAG steps of a tile only once the
first has issued all of its own: these run under the first group's statistics, and the first's next steps under the
second's.

It has compiled for Hopper, and its order of events has run in software (tests/kernels/partitions.py), but not on a GPU.
So no built-in tile asks for it: search.py tries it where --cooperative wants that, and an entry of its file may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from tuned_lens_fast.kernels.launch import Partition, Tile, head_arguments, processors
from tuned_lens_fast.kernels.logits import EMPTY, MASKED
from tuned_lens_fast.kernels.overlapped import descriptors
from tuned_lens_fast.kernels.running_state import add_tile, item_of, store_state

if TYPE_CHECKING:
    from tuned_lens_fast.engines.interface import Head

#: Arguments that change from launch to launch: one compiled kernel serves them all.
_SIZES = ["R", "V", "groups", "tiles", "row_blocks", "band", "splits", "last_splits", "items", "programs", "slots8"]
#: Triton 3.6 calls it async_copy_global_to_shared.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _in_layout_of(value, like):
    """``value`` in the layout of ``like``."""
    return gl.convert_layout(value, like.type.layout)


@gluon.jit
def _copy(
    x,  # descriptor of [R, D]
    w,  # that of [MEMBERS, groups, D]
    filled,  # barriers [STAGES], as free
    free,
    x_ring,  # shared [STAGES, BM, BK]
    w_ring,  # shared [STAGES, MEMBERS, 8, BK]
    tiles, row_blocks, band, splits, last_splits, items, programs,
    BM: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, MERGED: gl.constexpr,
):  # fmt: skip
    """The ninth warp: brings the steps of x and W that the two groups multiply, item after item."""
    stage = 0
    phase = 1
    for item in range(gl.program_id(0), items, programs):
        block, start, stop, _ = item_of(item, tiles, row_blocks, band, splits, last_splits, MERGED)
        for tile in range(start, stop):
            for k in range(STEPS):
                mbarrier.wait(free.index(stage), phase)
                mbarrier.expect(filled.index(stage), x.block_type.nbytes + w.block_type.nbytes)
                _load_tile(x, [block * BM, k * BK], filled.index(stage), x_ring.index(stage))
                _load_tile(w, [0, tile * 8, k * BK], filled.index(stage), w_ring.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _half_of_the_rows(
    WHO: gl.constexpr,
    target_logits,  # fp32 [R]
    state,  # fp32, see running_state.py
    group_maxima,  # fp32 [R, 2, slots]
    filled,  # barriers [STAGES], as free
    free,
    lead,  # barrier [1]
    x_ring,  # shared [STAGES, BM, BK]
    w_ring,  # shared [STAGES, MEMBERS, 8, BK]
    R, V, groups, tiles, row_blocks, band, splits, last_splits, items, programs, slots8, place_mask,
    bias,  # [V]
    scale, softcap,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    MERGED: gl.constexpr, BIAS: gl.constexpr, SCALE: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr,
    RANK: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    """One of the two groups of warps: multiplies its rows of every tile, and takes their statistics."""
    MEMBERS: gl.constexpr = BN // 8
    OWN: gl.constexpr = BM // 2
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BN, 16])
    column = gl.arange(0, BN, gl.SliceLayout(0, logits))
    nothing = gl.zeros([OWN, BN], gl.float32, logits)
    grouped: gl.constexpr = nothing.reshape([OWN, MEMBERS, 8]).type.layout
    a_group: gl.constexpr = gl.SliceLayout(1, grouped)
    stage = 0
    phase = 0
    turn = 0
    for item in range(gl.program_id(0), items, programs):
        block, start, stop, split = item_of(item, tiles, row_blocks, band, splits, last_splits, MERGED)
        row = block * BM + WHO * OWN
        rows = row + gl.arange(0, OWN, gl.SliceLayout(1, a_group))
        row_mask = rows < R
        target_logit = gl.zeros([OWN], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, grouped)))
        if RANK:
            own = row + gl.arange(0, OWN, gl.SliceLayout(1, gl.SliceLayout(2, grouped)))
            target_logit = gl.load(target_logits + own, mask=own < R, other=0.0)
        m = gl.full([OWN, 8], EMPTY, gl.float32, a_group)
        s = gl.zeros([OWN, 8], gl.float32, a_group)
        t = gl.zeros([OWN, 8], gl.float32, a_group)
        above = gl.zeros([OWN, 8], gl.float32, a_group)
        largest = gl.full([OWN, 8], MASKED, gl.float32, a_group)
        first = largest
        second = largest
        for tile in range(start, stop):
            acc = nothing
            before = stage
            for k in range(STEPS):
                if WHO == 1 and LAG > 0:
                    mbarrier.wait(lead.index(0), turn, pred=k == STEPS - LAG)
                mbarrier.wait(filled.index(stage), phase)
                mine = x_ring.index(stage).slice(WHO * OWN, OWN, 0)
                weight = w_ring.index(stage).reshape([BN, BK]).permute((1, 0))
                acc = warpgroup_mma(mine, weight, acc, use_acc=k > 0, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                mbarrier.arrive(free.index(before), count=1, pred=k > 0)  # the product before this one is done
                before = stage
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            turn ^= 1
            if WHO == 0 and LAG > 0:
                mbarrier.arrive(lead.index(0), count=1)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(free.index(before), count=1)
            token = tile * 8 + column % 8 + (column // 8) * groups
            m, s, t, above, largest, first, second = add_tile(
                acc, m, s, t, above, largest, first, second, target_logit, bias, token, token < V, column // 8,
                tile % MERGED, tile // MERGED, group_maxima, rows, row_mask,
                gl.arange(0, 8, gl.SliceLayout(0, a_group)), slots8 * 8, scale, softcap, place_mask,
                OWN, BN, MEMBERS, MERGED, BIAS, SCALE, SOFTCAP, False, ENTROPY, RANK, TOP, _in_layout_of,
            )  # fmt: skip
        store_state(
            m, s, t, above, state, block, rows, row_mask, split, R, row_blocks, band, splits, last_splits,
            BM, 1, ENTROPY, RANK,
        )  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _cooperative(
    x,  # descriptor of [R, D]
    w,  # that of [MEMBERS, groups, D]
    target_logits,  # fp32 [R]
    state,  # fp32, see running_state.py
    group_maxima,  # fp32 [R, 2, slots]
    R, V, groups, tiles, row_blocks, band, splits, last_splits, items, programs, slots8, place_mask,
    bias,  # [V]
    scale, softcap,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    MERGED: gl.constexpr, BIAS: gl.constexpr, SCALE: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr,
    RANK: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    """The parts of the state that are a program's: of every item that it takes, one."""
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BN // 8, 8, BK], w.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(lead.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    # Written out twice: Gluon puts no tuples together that hold constants and what is not there.
    gl.warp_specialize(
        [
            (_half_of_the_rows, (0, target_logits, state, group_maxima, filled, free, lead, x_ring, w_ring, R, V,
                                 groups, tiles, row_blocks, band, splits, last_splits, items, programs, slots8,
                                 place_mask, bias, scale, softcap, BM, BN, BK, STEPS, STAGES, LAG, MERGED, BIAS, SCALE,
                                 SOFTCAP, ENTROPY, RANK, TOP)),
            (_half_of_the_rows, (1, target_logits, state, group_maxima, filled, free, lead, x_ring, w_ring, R, V,
                                 groups, tiles, row_blocks, band, splits, last_splits, items, programs, slots8,
                                 place_mask, bias, scale, softcap, BM, BN, BK, STEPS, STAGES, LAG, MERGED, BIAS, SCALE,
                                 SOFTCAP, ENTROPY, RANK, TOP)),
            (_copy, (x, w, filled, free, x_ring, w_ring, tiles, row_blocks, band, splits, last_splits, items, programs,
                     BM, BK, STEPS, STAGES, MERGED)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def shared_bytes(tile: Tile) -> int:
    """Of a program: the ring of stages and the barriers, for 16-bit operands."""
    return 2 * tile.block_depth * tile.stages * (tile.block_rows + tile.block_vocab) + 8 * (1 + 2 * tile.stages)


def serves(steps: int, stages: int, lag: int) -> bool:
    """Whether the second group may be held back so many of a tile's steps.

    The ring has to hold these and one more. And the first may not issue the whole next tile meanwhile, for a barrier
    knows but the parity of its phase: the ring must be too short for that.
    """
    return lag == 0 or (0 < lag < stages < steps + lag and lag <= steps)


def whole_tiles(
    x: Tensor, head: Head, tile: Tile, partition: Partition,
    target_logits: Tensor | None, state: Tensor, group_maxima: Tensor | None, asked: dict[str, bool],
) -> None:  # fmt: skip
    """The statistics of the vocabulary's whole tiles; arguments as in overlapped.py, with one part a row and slice.

    Raises:
        ValueError: the tile is none that this kernel can take.
    """
    steps = triton.cdiv(x.shape[1], tile.block_depth)
    if tile.warps != 8 or tile.stages < 2 or not serves(steps, tile.stages, tile.lag):
        raise ValueError(f"tile: got {tile} for {steps} steps, wanted 8 warps, 2 stages and a lag that serves() allows")
    programs = min(processors(x.device), partition.items)
    _cooperative[(programs,)](
        *descriptors(x, head, tile, partition), target_logits, state, group_maxima,
        len(x), head.vocab, partition.groups, *partition.arguments(), partition.items, programs,
        partition.slots // 8, partition.place_mask, **head_arguments(head),
        BM=tile.block_rows, BN=tile.block_vocab, BK=tile.block_depth, STEPS=steps, STAGES=tile.stages, LAG=tile.lag,
        MERGED=tile.merged, **asked, num_warps=tile.warps // 2, enable_fp_fusion=True,
    )  # fmt: skip
