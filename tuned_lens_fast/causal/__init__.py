"""Which directions of the residual stream matter to what a lens reads, and what a model does without them."""

from tuned_lens_fast.causal.ablation import ablate_layer
from tuned_lens_fast.causal.subspaces import CausalBasis, ablate_subspace, extract_causal_bases, remove_subspace
from tuned_lens_fast.causal.utils import derange, sample_derangement

__all__ = [
    "CausalBasis",
    "ablate_layer",
    "ablate_subspace",
    "derange",
    "extract_causal_bases",
    "remove_subspace",
    "sample_derangement",
]
