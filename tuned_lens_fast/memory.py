"""How much memory a piece of work takes beyond what was in use before it: read here for the package and bench."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch


class PeakMemory:
    """How much memory beyond that at the start was in use at most: allocated on a GPU, else resident.

    Args:
        device: whose memory.
        trim: first give back what Python and the allocators kept of former work, which would hide growth.
    """

    def __init__(self, device: torch.device, trim: bool = False) -> None:
        self.device = device
        if trim:
            gc.collect()
        if device.type == "cuda":
            if trim:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start: int | None = torch.cuda.memory_allocated(device)
            return
        if trim and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        try:
            # Sets the resident peak back to what is resident now (man 5 proc).
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._resident_peak()
        except OSError:
            self.start = None

    def growth(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self.start is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._resident_peak()
        return max(0, now - self.start)

    @staticmethod
    def _resident_peak() -> int:
        status = Path("/proc/self/status").read_text()
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if match is None:
            raise OSError("/proc/self/status has no VmHWM")
        return int(match[1]) * 1024
