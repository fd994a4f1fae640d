"""The small loop of the orchestration tests, with its fixtures."""

from finetune_pipeline_tests.orchestration.conftest import (  # noqa: F401
    corrected,
    definitions,
    instance,
    loop,
    make_loop,
    write_events,
)
