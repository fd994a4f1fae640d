"""How fast and how large this machine is, measured in a second. Loads torch."""

import time

from finetune_pipeline.training.estimate import CONTEXT_BYTES, PROCESS_BYTES
from finetune_pipeline.training.memory import available_bytes
from finetune_pipeline.training.presets import ASSUMED_SHARE, Machine

_SIZE = {"cpu": 1024, "gpu": 8192}
_PRODUCTS = 5


def this_machine() -> Machine:
    """This machine's free memory, and the speed of its matrix products, of which a training reaches a share."""
    import torch

    gpu = torch.cuda.is_available()
    available = available_bytes() + (CONTEXT_BYTES if gpu else PROCESS_BYTES)  # the part that this process holds
    bf16 = gpu and torch.cuda.is_bf16_supported()
    peak = _products_a_second(gpu, bf16)
    kind = "bfloat16" if bf16 else "float32"
    source = f"{ASSUMED_SHARE:.0%} (assumed) of the {peak / 1e12:.3g} that {kind} matrix products reach here (measured)"
    return Machine("gpu" if gpu else "cpu", available, bf16, ASSUMED_SHARE * peak, source)


def _products_a_second(gpu: bool, bf16: bool) -> float:
    """Operations a second of the best of some square matrix products."""
    import torch

    size = _SIZE["gpu" if gpu else "cpu"]
    kind = torch.bfloat16 if bf16 else torch.float32
    matrix = torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=kind)
    best = float("inf")
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
