"""Makes tests/reference.py importable from every test, and chooses Triton's interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

# Before anything imports Triton: it looks at this variable when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))
