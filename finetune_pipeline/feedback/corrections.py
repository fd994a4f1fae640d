"""The check of a correction against the loop's output schema, before it is recorded, wherever it comes from.

A correction that the schema rejects would only remove a usable example: curation would leave it out. So the client and
the gateway refuse it, and a line of a file is rejected with the reason.
"""

import logging
from functools import lru_cache
from pathlib import Path

from finetune_pipeline.schemas import SchemaError, Validator, answer_validator, load_schema
from finetune_pipeline.settings import LoopSettings, project_path

_log = logging.getLogger(__name__)


def correction_problem(loop: LoopSettings, correction: str) -> str | None:
    """Return why a correction cannot train in this loop, or None if it can.

    The schema file is read again when it changes. If it cannot be read, the correction is not checked: a person's
    feedback is not refused because of a damaged file.
    """
    if loop.output_schema is None:
        return None
    path = project_path(loop.output_schema)
    try:
        stat = path.stat()
        problem = _validator(path, stat.st_mtime_ns, stat.st_size)(correction)
    except (OSError, SchemaError) as error:
        _log.warning("a correction is not checked against the output schema: %s", error)
        return None
    if problem is None:
        return None
    return f"correction: {problem}; the output schema of loop {loop.name} does not accept it, so it could not train"


@lru_cache(maxsize=16)
def _validator(path: Path, *_stamp: int) -> Validator:
    return answer_validator(load_schema(path))
