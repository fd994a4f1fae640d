import pytest

from finetune_pipeline.settings import LoopSettings, load_loop
from finetune_pipeline_tests.feedback.gateway import running_gateway


@pytest.fixture
def loop() -> LoopSettings:
    """The default loop's settings under another name, with answers of free text."""
    return load_loop("aec_parser").model_copy(
        update={"name": "notes", "system_prompt": "Parse.", "output_schema": None}
    )


@pytest.fixture
def gateway():
    with running_gateway() as server:
        yield server
