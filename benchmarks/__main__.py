"""Run the benchmarks: `python -m benchmarks [NAME ...]`; without a name, all but the setup.

adapter_swap  another adapter over the same base, at rest and under 8 clients: how long it takes
definitions   all definitions resolved, and which heavy packages that loaded
loop          the whole loop on the sample logs for three seeds: time, memory of each process, accuracy by wording
setup         a fresh clone set up with empty and with warm package caches (about 10 minutes)

Each prints a Markdown table and writes `benchmarks/results/NAME.json`.
"""

import sys

from benchmarks import adapter_swap, definitions, loop, setup

ALL = {"adapter_swap": adapter_swap.main, "definitions": definitions.main, "loop": loop.main, "setup": setup.main}


def main() -> None:
    """Run the named benchmarks, one after the other."""
    names = sys.argv[1:] or ["adapter_swap", "definitions", "loop"]
    unknown = [name for name in names if name not in ALL]
    if unknown:
        sys.exit(f"no benchmark is named {', '.join(unknown)}; there are: {', '.join(ALL)}")
    for name in names:
        ALL[name]()


if __name__ == "__main__":
    main()
