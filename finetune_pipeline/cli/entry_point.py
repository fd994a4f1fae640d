"""The entry point of the `finetune` command."""

import sys


def main() -> None:
    """Run the command. Ctrl-C while its modules load, which takes seconds, ends it without a traceback."""
    try:
        from finetune_pipeline.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a process that SIGINT ended
    run()
