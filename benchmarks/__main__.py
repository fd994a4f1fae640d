"""Run benchmarks: `python -m benchmarks [NAME ...]`; without a name, all but the slowest.

adapter_swap    time to swap the adapter over the same base, idle and with 8 clients
burn_in         the gate on unchanged retrains of the default loop: how often it would promote (about 20 minutes)
code            2,000 Python files read as a source, without a teacher: time and memory
console         first load and navigation with 100,000 interactions, beside an empty page of Streamlit (needs Chromium)
constrained     tokens per second with and without the default loop's schema: the starter model, SmolLM2 (3 minutes)
curation        500 to 1,000,000 log rows to a dataset; near-duplicate removal and other libraries (about 10 minutes)
definitions     time to resolve all definitions, and the heavy packages that this imports
engine_threads  libgomp's default, its PASSIVE and the engine's own way to wait, idle and next to busy loops (3 minutes)
few_examples    fixed settings and `training: auto` on little data: the starter model, SmolLM2 (2 hours)
gateway         overhead per request, tokens per second by clients, hot swaps under load, rollback
gateway_peers   the gateway's overhead compared with an earlier commit, and with litellm's proxy (about 10 minutes)
llama_server    tokens per second, 8 clients and adapter swaps compared with llama-server (needs xllamacpp)
loop            the complete loop on the sample logs for three seeds: time, memory of each process, accuracy by wording
methods         SFT, DPO and KTO on the sample logs, and with few desirable completions (about half an hour)
memory          estimated and measured peak memory of training on a CPU
parallel_decoding  parallel decoding compared with llama-cpp-python one at a time, and llama-server (10 minutes)
real            SNIPS's intents and slots on SmolLM2, compared with TRL's recipe (hours; skipped without the data)
setup           a new clone set up with an empty and with a filled package cache (about 10 minutes)
store           recording events, and other libraries; a million interactions (about 3 minutes)
training        tokens per second and validation loss in bfloat16 and float32, compared with plain TRL
vault           an Obsidian vault of 10,000 notes read as a source

Each prints a Markdown table and writes `benchmarks/results/NAME.json`.
"""

import sys

from benchmarks import (
    adapter_swap,
    burn_in,
    code,
    console,
    constrained,
    curation,
    definitions,
    engine_threads,
    few_examples,
    gateway,
    gateway_peers,
    llama_server,
    loop,
    memory,
    methods,
    parallel_decoding,
    real,
    setup,
    store,
    training,
    vault,
)

MODULES = (
    adapter_swap, burn_in, code, console, constrained, curation, definitions, engine_threads, few_examples, gateway,
    gateway_peers, llama_server, loop, memory, methods, parallel_decoding, real, setup, store, training, vault,
)  # fmt: skip
BENCHMARKS = {module.__name__.removeprefix("benchmarks."): module.main for module in MODULES}
SLOW = {"burn_in", "console", "few_examples", "gateway_peers", "methods", "parallel_decoding", "real", "setup"}


def main() -> None:
    """Run the named benchmarks one after the other."""
    names = sys.argv[1:] or [name for name in BENCHMARKS if name not in SLOW]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"There is no benchmark {', '.join(unknown)}. Use: {', '.join(BENCHMARKS)}.")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
