"""What Dagster loads: every loop that is declared under `defs/`."""

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """All assets, checks, jobs, sensors and schedules of all loops."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
