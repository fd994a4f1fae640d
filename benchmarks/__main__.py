"""Run benchmarks: `python -m benchmarks [NAME ...]`; without a name, all except methods and setup.

adapter_swap    time to swap the adapter over the same base, idle and with 8 clients
code            2,000 Python files read as a source, without a teacher: time and memory
curation        500 to 1,000,000 log rows to a dataset; near-duplicate removal and other libraries (about 10 minutes)
definitions     time to resolve all definitions, and the heavy packages that this imports
engine_threads  libgomp's default, its PASSIVE and the engine's own way to wait, idle and next to busy loops (3 minutes)
gateway         overhead per request, tokens per second by clients, hot swaps under load, rollback
llama_server    tokens per second, 8 clients and adapter swaps compared with llama-server (needs xllamacpp)
loop            the complete loop on the sample logs for three seeds: time, memory of each process, accuracy by wording
methods         SFT, DPO and KTO on the sample logs, and with few desirable completions (about half an hour)
memory          estimated and measured peak memory of training on a CPU
setup           a new clone set up with an empty and with a filled package cache (about 10 minutes)
store           recording events, and other libraries; a million interactions (about 3 minutes)
training        tokens per second and validation loss in bfloat16 and float32, compared with plain TRL
vault           an Obsidian vault of 10,000 notes read as a source

Each prints a Markdown table and writes `benchmarks/results/NAME.json`.
"""

import sys

from benchmarks import (
    adapter_swap,
    code,
    curation,
    definitions,
    engine_threads,
    gateway,
    llama_server,
    loop,
    memory,
    methods,
    setup,
    store,
    training,
    vault,
)

MODULES = (
    adapter_swap, code, curation, definitions, engine_threads, gateway, llama_server, loop, memory, methods, setup,
    store, training, vault,
)  # fmt: skip
BENCHMARKS = {module.__name__.removeprefix("benchmarks."): module.main for module in MODULES}
SLOW = {"methods", "setup"}


def main() -> None:
    """Run the named benchmarks one after the other."""
    names = sys.argv[1:] or [name for name in BENCHMARKS if name not in SLOW]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"There is no benchmark {', '.join(unknown)}. Use: {', '.join(BENCHMARKS)}.")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
