"""Ask the regression suite: the corrections that earlier promotions fixed, and those that a challenger fixes now.

The suite is a second benchmark, whose questions are training examples. It is no part of the score or the gain, and
decontamination does not look at it.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter

from finetune_pipeline.artifacts import Artifact, hash_of
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION, SPLITS, read_split, turns_of
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import Benchmark, BenchmarkQuestion
from finetune_pipeline.evaluation.regression import RegressionSuite, SuiteAnswer
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import GgufManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.required_checks import dataset_of
from finetune_pipeline.registry.regression_questions import RegressionQuestion, other_corrections, standing_questions
from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.settings import LoopSettings

MAX_QUESTIONS = 200
"""Questions that a model is asked: a fixed sample of the standing ones, and of new corrections the newest."""

_COLUMNS = ["interaction_id", "content_hash", "prompt", "history", "completion"]

OnProgress = Callable[[str, int, int], None]
"""Called with what answers, the number of answers so far, and the number of questions."""


def ask_suite(
    loop: LoopSettings, champion: ModelSpec, challenger: ModelSpec, scorer: Scorer, on_progress: OnProgress
) -> RegressionSuite | None:
    """Return the answers of both models to the standing questions; None if there are none.

    Raises:
        EngineError: a model cannot be loaded, or crashed.
        MetricError: the gate's metric failed.
    """
    suite = _benchmark(loop, standing_questions(connect(), loop.name))
    if not suite.questions:
        return None
    asked = suite.sample_of(MAX_QUESTIONS)
    before, after = (
        [
            (answer, scorer.is_correct(question, answer))
            for question, answer in _ask(loop, name, spec, asked, on_progress)
        ]
        for name, spec in (("champion", champion), ("challenger", challenger))
    )
    rows = zip(asked.questions, before, after, strict=True)
    return RegressionSuite(len(suite.questions), tuple(SuiteAnswer(one, *old, *new) for one, old, new in rows))


def fixed_corrections(
    loop: LoopSettings, gguf: Artifact[GgufManifest], scorer: Scorer, on_progress: OnProgress
) -> list[RegressionQuestion]:
    """Return the newest corrections in a model's datasets that it answers correctly and that no question stands for.

    That they were answered incorrectly before is known, because a person corrected them.

    Raises:
        ArtifactError: a dataset is missing, or was edited.
        EngineError: the model cannot be loaded, or crashed.
        MetricError: the gate's metric failed.
    """
    newest = [one for _, one in heapq.nlargest(MAX_QUESTIONS, _corrections(loop, gguf), key=itemgetter(0))]
    asked = _benchmark(loop, newest)
    if not asked.questions:
        return []
    answered = _ask(loop, "challenger", model_spec(gguf), asked, on_progress)
    correct = {question.id for question, answer in answered if scorer.is_correct(question, answer)}
    return [one for one in newest if one.interaction_id in correct]


def _corrections(loop: LoopSettings, gguf: Artifact[GgufManifest]) -> Iterator[tuple[int, RegressionQuestion]]:
    """Yield the corrections that a model was trained on or validated with, each once, with their ingest offsets."""
    wanted = other_corrections(connect(), loop.name)
    for version in gguf.manifest.datasets:
        folder = dataset_of(loop.name, version).path
        for row in (row for split in SPLITS for row in read_split(folder, PROMPT_COMPLETION, split, _COLUMNS)):
            offset, content_hash = wanted.get(row["interaction_id"], (0, ""))
            if content_hash and content_hash == row["content_hash"]:
                del wanted[row["interaction_id"]]
                yield (
                    offset,
                    RegressionQuestion(
                        interaction_id=row["interaction_id"],
                        content_hash=content_hash,
                        prompt=row["prompt"],
                        history=turns_of(row),
                        expected=row["completion"],
                    ),
                )


def _benchmark(loop: LoopSettings, corrections: Iterable[RegressionQuestion]) -> Benchmark:
    """Return corrections as a benchmark, without those that are no objects in a loop whose answers are objects."""
    objects = any(isinstance(one.expected, dict) for one in loop_files.benchmark(loop).questions)
    questions = tuple(
        BenchmarkQuestion(
            id=one.interaction_id, slice="corrections", prompt=one.prompt, history=one.history, expected=expected
        )
        for one in corrections
        if (expected := _object(one.expected) if objects else one.expected)
    )
    return Benchmark(questions, hash_of([one.as_json() for one in questions]))


def _object(text: str) -> dict[str, object] | None:
    try:
        value = parse_json(text)
    except InvalidJsonError:
        return None
    return value if isinstance(value, dict) else None


def _ask(
    loop: LoopSettings, name: str, spec: ModelSpec, asked: Benchmark, on_progress: OnProgress
) -> list[tuple[BenchmarkQuestion, str]]:
    run = answer_benchmark(
        spec,
        asked,
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        partial(on_progress, f"{name}, corrections,"),
        constraint=loop_files.constraint(loop),
        rejected_is_wrong=True,
    )
    return [(question, answer.text) for question, answer in zip(asked.questions, run.answers, strict=True)]
