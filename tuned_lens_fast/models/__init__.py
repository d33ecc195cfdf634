"""Models, as far as lenses touch them: how one ends, what runs through its blocks, how it runs chunk by chunk.

The way from hidden state to statistics begins here; everything after it sees plain tensors and descriptions.
"""
