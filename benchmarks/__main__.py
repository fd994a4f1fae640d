"""Run the benchmarks: `python -m benchmarks [NAME ...]`; without a name, all but methods and setup.

adapter_swap  another adapter over the same base, at rest and under 8 clients: how long it takes
code          2,000 Python files read as a source, without a teacher: time and memory
curation      500 to 1,000,000 log rows to a dataset; near-duplicate removal beside its peers (about 10 minutes)
definitions   all definitions resolved, and which heavy packages that loaded
engine_threads  libgomp's default, its PASSIVE and the engine's own way to wait, quiet and beside busy loops (3 minutes)
gateway       overhead of a request, tokens per second by clients, swaps under load, rollback
llama_server  tokens per second, 8 clients and adapter swaps beside llama-server (needs xllamacpp, see the file)
loop          the whole loop on the sample logs for three seeds: time, memory of each process, accuracy by wording
methods       SFT, DPO and KTO on the sample logs, and where few answers are good (about half an hour)
memory        the estimated peak of a training beside the measured one, on a CPU
setup         a fresh clone set up with empty and with warm package caches (about 10 minutes)
store         recording events beside its peers; a million interactions (about 3 minutes)
training      tokens per second and validation loss, beside TRL's plain recipe, in bfloat16 and float32
vault         an Obsidian vault of 10,000 notes, read

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

ALL = {
    "adapter_swap": adapter_swap.main,
    "code": code.main,
    "curation": curation.main,
    "definitions": definitions.main,
    "engine_threads": engine_threads.main,
    "gateway": gateway.main,
    "llama_server": llama_server.main,
    "loop": loop.main,
    "methods": methods.main,
    "memory": memory.main,
    "setup": setup.main,
    "store": store.main,
    "training": training.main,
    "vault": vault.main,
}


def main() -> None:
    """Run the named benchmarks, one after the other."""
    names = sys.argv[1:] or [name for name in ALL if name not in {"methods", "setup"}]
    unknown = [name for name in names if name not in ALL]
    if unknown:
        sys.exit(f"no benchmark is named {', '.join(unknown)}; there are: {', '.join(ALL)}")
    for name in names:
        ALL[name]()


if __name__ == "__main__":
    main()
