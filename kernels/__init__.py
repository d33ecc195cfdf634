"""Triton kernels, one a file, each with its launch beside it.

In the order in which a decode runs them: translate, norm, target_logits, vocabulary_pass (or overlapped, or
cooperative), top_k, divergence.
"""
