"""The Dagster definitions: every loop that is declared under `defs/` or in `FINETUNE_LOOPS_DIR`."""

import warnings
from pathlib import Path

import dagster as dg

from finetune_pipeline.orchestration.component import loop_definitions
from finetune_pipeline.settings import load_loops, loops_dir, read_loop

# The steps run one after the other and heavy work runs in child processes, so one process per step would only add
# start-up time.
EXECUTOR = dg.in_process_executor


@dg.definitions
def defs() -> dg.Definitions:
    """Load the assets, checks, jobs, sensors and schedules of all loops."""
    load_loops()  # reports invalid files and duplicate names before Dagster loads them
    declared = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    outside = loops_dir()
    loops = [with_yaml(path) for path in sorted(outside.glob("*/defs.yaml"))] if outside else []
    return dg.Definitions.merge(declared, *loops, dg.Definitions(executor=EXECUTOR))


def with_yaml(path: Path) -> dg.Definitions:
    """Return the definitions of a loop outside the package, with the link to its YAML that components get."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        reference = dg.LocalFileCodeReference(file_path=str(path), line_number=1)
        metadata = {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[reference])}
        loop = loop_definitions(read_loop(path))
        return loop.map_asset_specs(func=lambda spec: spec.merge_attributes(metadata=metadata))
