"""A comparison in a child process of the server that claims it: `python -m ...pipeline.comparison_child ID`.

It gets the loop's settings as JSON on stdin. A process of its own, because a model that crashes, and the libraries that
write the report, must not touch the server.
"""

import signal
import sys

from finetune_pipeline.pipeline.comparisons import run_comparison
from finetune_pipeline.settings import LoopSettings

COMMAND = [sys.executable, "-m", "finetune_pipeline.pipeline.comparison_child"]
"""The command of the child, without the comparison's id."""


def main() -> None:
    """Do the comparison whose id is the first argument."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the lease is given back
    loop = LoopSettings.model_validate_json(sys.stdin.buffer.read())
    run_comparison(loop, sys.argv[1], lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
