"""Everything a user would otherwise run, one small adapter a file, and our own engines.

A contender turns a :class:`~presets.Problem` into a call without arguments, which answers with tensors named and shaped
as an engine's: ``[layers, positions]``, or ``[layers, positions, k]``. What is not part of the job (building somebody's
lens object out of the same tensors, importing, compiling) happens before that call.
"""

from __future__ import annotations

from contenders import fused_losses, layer_loop, ours, product, scratch, tuned_lens_trajectory
from contenders.adapter import Contender

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        product.READ,
        product.LINEAR,
        product.ROWS,
        product.TILES,
        product.OWN,
        *ours.CONTENDERS,
        layer_loop.PLAIN,
        layer_loop.COMPILED,
        scratch.SCRATCH,
        tuned_lens_trajectory.TRAJECTORY,
        *fused_losses.LOSSES,
    )
}
