"""Export of redacted examples."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from finetune_pipeline.curation.redaction import redact_texts
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.formats import ExportResult, export_alpaca
from finetune_pipeline.settings import LoopSettings


def export_examples(
    path: Path, loop: LoopSettings, database: Database, *, min_reward: float = -1.0, force: bool = False
) -> tuple[ExportResult, Counter[str]]:
    """Write a loop's examples as Alpaca rows without secrets and personal data.

    Returns:
        How many were written and left out, and how many texts of which kind were replaced by placeholders.

    Raises:
        FeedbackError: the file exists (and not `force`), or cannot be written.
    """
    replaced: Counter[str] = Counter()

    def clean(texts: Sequence[str]) -> list[str]:
        redacted, counts = redact_texts(texts, loop.curation.redaction)
        replaced.update(counts)
        return redacted

    return export_alpaca(path, loop, database, clean, min_reward=min_reward, force=force), replaced
