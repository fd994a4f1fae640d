"""Memory, cores and speed of this machine, within the limits of its container."""

import sys
import time
from pathlib import Path

from finetune_pipeline.inference.threads import available_cores
from finetune_pipeline.training.estimate import CONTEXT_BYTES, PROCESS_BYTES
from finetune_pipeline.training.presets import ASSUMED_UTILIZATION, SMALL_BATCH, Machine

_CGROUP_MEMORY = (  # limit and usage, in versions 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def this_machine() -> Machine:
    """Measure this machine's free memory and the speed of its matrix products. Takes a second and loads torch.

    On a CPU the speed is that of idle cores, also while other programs use them.
    """
    import torch

    gpu = torch.cuda.is_available()
    bf16 = bf16_is_faster(SMALL_BATCH)
    size = 8192 if gpu else 1024
    # On a CPU training is far from the peak in bfloat16: a multiple of the rate in float32 says more.
    dtype = torch.bfloat16 if gpu and bf16 else torch.float32
    matrix = torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=dtype)
    # On a CPU, one thread's processor time: other programs on the cores make a run's wall time several times as long,
    # and several threads would count the time for which they wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if gpu else 1)
    clock = time.perf_counter if gpu else time.thread_time
    fastest = float("inf")
    for _ in range(8):
        began = clock()
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        fastest = min(fastest, clock() - began)
    torch.set_num_threads(threads)
    peak = 2 * size**3 / fastest * (1 if gpu else threads)
    kind = "bfloat16" if gpu and bf16 else "float32"
    return Machine(
        device="gpu" if gpu else "cpu",
        bytes=available_memory() + (CONTEXT_BYTES if gpu else PROCESS_BYTES),  # this process already uses that part
        bf16=bf16,
        rate=ASSUMED_UTILIZATION * peak,
        source=f"{ASSUMED_UTILIZATION:.0%} (assumed) of the {peak / 1e12:.3g} that {kind} "
        f"matrix products reach here (measured{'' if gpu else ' by processor time, as on idle cores'})",
    )


def bf16_is_faster(batch_size: int) -> bool:
    """Return whether bfloat16 is faster here: on GPUs that have it, and on CPUs with instructions for it.

    On a CPU the batch must be large enough to pay for the casts.
    """
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if batch_size < SMALL_BATCH or not Path("/proc/cpuinfo").exists():
        return False
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def available_memory() -> int:
    """Return the free bytes of the GPU or, without one, of main memory: in a container, what its limit leaves."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else main_memory()


def main_memory() -> int:
    """Return the free bytes of main memory: in a container, what its limit leaves. Loads no torch."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUP_MEMORY:
        try:
            left = int(Path(limit).read_text()) - int(Path(usage).read_text())
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
        try:
            statistics = (Path(limit).parent / "memory.stat").read_text().split()  # name, value, name, ...
            counts = dict(zip(statistics[::2], statistics[1::2], strict=True))
        except (OSError, ValueError):
            counts = {}
        # cgroups count the page cache as used, though it is given back on demand.
        cached = sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))
        available = min(available, max(left, 0) + cached)
    return available


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this process
        line = next(line for line in status.read_text().split("\n") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cores() -> int:
    """Return the number of physical cores that this process may use."""
    import psutil

    allowed = len(available_cores())
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPU quota of this process's cgroup and its parents, in cores (Linux); None without a limit.

    Args:
        root: where cgroups of version 2 are mounted.
        own: file that names this process's cgroup.
    """
    try:
        group = next(line for line in own.read_text().split("\n") if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):  # not Linux, or only version 1
        return None
    quotas = []
    for folder in [root / group, *(root / group).parents]:
        try:
            allowed, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(allowed) / int(period))
        except (OSError, ValueError):  # the root group has none, or it is "max"
            continue
    return min(quotas, default=None)


def threads_per_process(cores: int, quota: float | None, processes: int) -> int:
    """Return the threads of each of several processes, which together should not outnumber the usable cores.

    torch starts a thread for each core that it sees, which in a container with a CPU quota are too many: they would
    wait for each other. The container's CPU quota, if there is one, is in cores.
    """
    usable = cores if quota is None else min(cores, int(quota))
    return max(usable // processes, 1)
