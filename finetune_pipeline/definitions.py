"""The Dagster definitions: every loop that is declared under `defs/`."""

from pathlib import Path

import dagster as dg

# Each step runs in a separate process. A fork server has loaded Dagster already, which halves a step's start time.
EXECUTOR = dg.multiprocess_executor.configured({"start_method": {"forkserver": {}}})


@dg.definitions
def defs() -> dg.Definitions:
    """Load the assets, checks, jobs, sensors and schedules of all loops."""
    loops = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(loops, dg.Definitions(executor=EXECUTOR))
