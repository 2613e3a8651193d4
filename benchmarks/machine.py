"""What the benchmarks ran on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor as Linux names it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
