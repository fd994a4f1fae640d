"""Candidates to promote, on a real database of each kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.registry.models import Candidate

MakeCandidate = Callable[..., Candidate]


@pytest.fixture
def candidate(own_home: Path) -> MakeCandidate:
    """Makes a GGUF of some content and the candidate that names it."""

    def make(
        content: str, *, base: str = "base-1", mode: Literal["full", "incremental"] = "incremental", loop: str = "aec"
    ) -> Candidate:
        path = own_home / "artifacts" / loop / content / "model.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return Candidate(
            loop=loop,
            gguf_path=path,
            gguf_sha256=hash_file(path),
            base_hash=base,
            mode=mode,
            lineage={"watermark": 50},
            scores={"accuracy": 0.8},
            report_path=path.parent / "report.html",
        )

    return make
