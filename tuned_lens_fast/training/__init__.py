"""Trains a tuned lens, and says how good a lens is: from documents of token ids to translators of every layer.

It goes the way from hidden state to statistics and back: ``documents`` become sequences, ``states`` runs the model over
them once for all layers, ``lens.loss`` gives each layer's loss and gradient without logits, ``optimizers`` take the
step. ``ridge`` is where it starts, ``folder`` what it survives, ``report`` what it leaves; ``start`` checks what is
asked, and ``loop`` puts them together. ``evaluation`` asks any lens about whole texts.
"""

from tuned_lens_fast.training.report import TrainingReport
from tuned_lens_fast.training.start import train

__all__ = ["TrainingReport", "train"]
