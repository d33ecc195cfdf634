"""Triton kernels, one a file, each with its launch beside it.

In the order in which a decode runs them: translate, norm, gather, statistics, top_k, divergence.
"""
