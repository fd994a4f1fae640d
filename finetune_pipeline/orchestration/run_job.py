"""Execute one run of a loop's job in this process, without any of Dagster's servers.

    python -m finetune_pipeline.orchestration.run_job WORKSPACE JOB LOOP RUN_ID JOB_ID

The run gets the origin of the code location in the workspace file, as if the UI or the daemon had launched it. So it is
listed under its job and on the run timeline. Dagster's public API (`dg.execute_job`) creates runs without an origin and
`dagster job launch` needs a code server that outlives the command, hence the imports of `dagster._core`.
"""

import sys
from pathlib import Path

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.definitions.repository_definition import SINGLETON_REPOSITORY_NAME
from dagster._core.execution.api import execute_run
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.workspace.load import location_origins_from_yaml_paths
from dagster._utils.interrupts import capture_interrupts

from finetune_pipeline.pipeline.jobs import JOB_TAG, LOOP_TAG, PROCESS_TAG, this_process

DEFINITIONS = "defs"  # the attribute of the code location's module or file


def execute(workspace: Path, job_name: str, loop: str, run_id: str, job_id: str) -> bool:
    """Create the run and execute it; return whether it succeeded.

    SIGTERM and SIGINT end it after its steps have been interrupted.
    """
    (location,) = location_origins_from_yaml_paths([str(workspace)])
    assert isinstance(location, ManagedGrpcPythonEnvCodeLocationOrigin)
    target = location.loadable_target_origin
    if target.module_name:
        repository = ReconstructableRepository.for_module(target.module_name, DEFINITIONS, target.working_directory)
    else:
        assert target.python_file
        repository = ReconstructableRepository.for_file(target.python_file, DEFINITIONS, target.working_directory)
    job = repository.get_reconstructable_job(job_name)
    origin = RemoteRepositoryOrigin(code_location_origin=location, repository_name=SINGLETON_REPOSITORY_NAME)
    definition = job.get_definition()  # a signal until here ends the process at once, since there is no run yet
    with capture_interrupts(), dg.DagsterInstance.get() as instance:
        run = instance.create_run_for_job(
            definition,
            run_id=run_id,
            tags={**definition.run_tags, LOOP_TAG: loop, JOB_TAG: job_id, PROCESS_TAG: this_process()},
            remote_job_origin=origin.get_job_origin(job_name),
            job_code_origin=job.get_python_origin(),
        )
        return execute_run(job, run, instance).success


if __name__ == "__main__":
    sys.exit(0 if execute(Path(sys.argv[1]), *sys.argv[2:]) else 1)
