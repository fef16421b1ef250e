"""What a measurement ran on, and the memory it took."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

from mi_weightspace.spectral.blocks import private_bytes


def machine() -> str:
    """Processor, cores and memory in words; no host name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


class Peak(threading.Thread):
    """Highest private memory of this process while it runs, bytes."""

    def __init__(self, every: float = 0.005) -> None:
        """Args: every: seconds between two looks."""
        super().__init__(daemon=True)
        self.highest, self._ended, self._every = 0, threading.Event(), every

    def run(self) -> None:
        while not self._ended.is_set():
            self.highest = max(self.highest, private_bytes())
            self._ended.wait(self._every)

    def stop(self) -> int:
        """End it; the highest."""
        self._ended.set()
        self.join()
        return self.highest
