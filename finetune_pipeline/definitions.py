"""What Dagster loads: every loop that is declared under `defs/`."""

from pathlib import Path

import dagster as dg

# Steps run in processes of their own. A fork server has Dagster loaded already: half of a step's start is saved.
EXECUTOR = dg.multiprocess_executor.configured({"start_method": {"forkserver": {}}})


@dg.definitions
def defs() -> dg.Definitions:
    """All assets, checks, jobs, sensors and schedules of all loops."""
    loops = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(loops, dg.Definitions(executor=EXECUTOR))
