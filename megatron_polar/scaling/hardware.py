"""GPUs and links that a step's time is estimated for; peaks from NVIDIA's data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node, and what it has of the links. Bandwidths are of one direction; GB are 10^9 bytes."""

    name: str
    peak_tflops: float
    """Dense bf16."""
    fp8_peak_tflops: float
    """Dense FP8."""
    memory_gb: float
    memory_gb_s: float
    nvlink_gb_s: float
    """To the other GPUs of the node."""
    network_gb_s: float
    """To other nodes: one 400 Gb/s adapter for each GPU."""


GPUS = {
    "h100": Gpu("h100", 989.0, 1979.0, memory_gb=80.0, memory_gb_s=3350.0, nvlink_gb_s=450.0, network_gb_s=50.0),
    "h200": Gpu("h200", 989.0, 1979.0, memory_gb=141.0, memory_gb_s=4800.0, nvlink_gb_s=450.0, network_gb_s=50.0),
}
