"""The Dagster definitions: every loop that is declared under `defs/`."""

from pathlib import Path

import dagster as dg

# The steps run one after the other, and what is heavy runs in child processes, so a process for each step would only
# cost its start time.
EXECUTOR = dg.in_process_executor


@dg.definitions
def defs() -> dg.Definitions:
    """Load the assets, checks, jobs, sensors and schedules of all loops."""
    loops = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(loops, dg.Definitions(executor=EXECUTOR))
