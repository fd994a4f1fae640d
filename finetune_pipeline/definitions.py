"""The Dagster definitions: every loop that is declared under `defs/` or in `FINETUNE_LOOPS_DIR`."""

from pathlib import Path

import dagster as dg

from finetune_pipeline.orchestration.component import loop_definitions
from finetune_pipeline.settings import load_loops, loops_dir

# The steps run one after the other and heavy work runs in child processes, so one process per step would only add
# start-up time.
EXECUTOR = dg.in_process_executor


@dg.definitions
def defs() -> dg.Definitions:
    """Load the assets, checks, jobs, sensors and schedules of all loops."""
    load_loops()  # reports invalid files and duplicate names before Dagster loads them
    declared = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    outside = loops_dir()
    loops = load_loops([outside]).values() if outside else []
    return dg.Definitions.merge(declared, *map(loop_definitions, loops), dg.Definitions(executor=EXECUTOR))
