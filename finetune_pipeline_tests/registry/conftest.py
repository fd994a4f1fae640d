"""Candidates to promote, on real SQLite and PostgreSQL databases."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import Database, connect
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.registry.champion import champion, current_deployment, promote
from finetune_pipeline.registry.comparisons import ComparisonRecord, record_comparison_in
from finetune_pipeline.registry.model_versions import CandidateModel, ModelVersion
from finetune_pipeline.settings import PROJECT_ROOT

STARTER = PROJECT_ROOT / "data" / "starter_model"


def record_comparison(db: Database, comparison: ComparisonRecord) -> None:
    """Record a comparison in a separate transaction."""
    with db.write() as connection:
        record_comparison_in(connection, comparison)


def compared(db: Database, candidate: CandidateModel, id: str, **changes: Any) -> str:
    """Record a comparison that justifies promoting a candidate, and return its id."""
    now = current_deployment(db, candidate.loop)
    fields = {
        "id": id, "loop": candidate.loop, "challenger_sha256": candidate.sha256, "benchmark_sha256": "b" * 64,
        "champion_id": now.model.id if now.model else None, "champion_sha256": "c" * 64, "decision": "promote",
        "reason": "gain 6%", "watermark": 50, "report_path": candidate.report_path, "created_at": datetime.now(UTC),
        "report_sha256": "d" * 64, "after_deployment": now.deployment_id,
    }  # fmt: skip
    record_comparison(db, ComparisonRecord(**{**fields, **changes}))
    return id


def promote_over(db: Database, candidate: CandidateModel, reason: str = "gain 6%", actor: str = "loop") -> ModelVersion:
    """Compare a candidate with the champion, and promote it."""
    now = champion(db, candidate.loop)
    id = compared(db, candidate, f"c{uuid4().hex[:12]}")
    return promote(db, candidate, now.id if now else None, actor, reason, id)


def promote_gguf(path: Path, loop: str = "notes", **fields: Any) -> ModelVersion:
    """Promote a file as a model that was trained on the starter model."""
    candidate = CandidateModel(
        loop=loop, gguf_path=path, gguf_sha256=hash_file(path), base_hash=base_hash(STARTER), mode="full",
        lineage={"base_model": str(STARTER)}, scores={"accuracy": 0.5}, report_path=path, **fields,
    )  # fmt: skip
    return promote_over(connect(), candidate)


MakeCandidate = Callable[..., CandidateModel]


@pytest.fixture
def candidate(own_home: Path) -> MakeCandidate:
    """Return a function that writes a GGUF with some content and returns its candidate."""

    def make(
        content: str, *, base: str = "base-1", mode: Literal["full", "incremental"] = "incremental", loop: str = "aec"
    ) -> CandidateModel:
        path = own_home / "artifacts" / loop / content / "model.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return CandidateModel(
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
