"""Comparisons that a program or the console asks for: create, run, show pairs without names, and count votes.

A comparison is a row from the moment it is asked for. Whoever serves claims the row, so a killed process leaves a
comparison that waits again, and the answers that it had generated are reused. Two models are compared on the loop's
benchmark, by `compare_two`, or on given prompts, for which people's votes are the only result.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.database import Database, DatabaseError, connect
from finetune_pipeline.evaluation.benchmark import Benchmark, OpenQuestion
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.evaluation.metric_table import MetricRow
from finetune_pipeline.evaluation.report import JSON, ReportError, metrics_of_report
from finetune_pipeline.evaluation.run import answer_benchmark
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.challengers import find_trained
from finetune_pipeline.pipeline.compare import compare_two, find_model
from finetune_pipeline.pipeline.expected_errors import EXPECTED
from finetune_pipeline.registry.champion import BASE
from finetune_pipeline.registry.comparisons import list_manual_comparisons
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.registry.requested_comparisons import (
    Choice,
    ComparedPair,
    ComparisonLease,
    ComparisonLeaseLostError,
    ComparisonVote,
    RequestedComparison,
    RequestedComparisonError,
    claim_comparison,
    create_comparison,
    find_requested_comparison,
    new_comparison_id,
    pairs_of,
    record_vote,
    votes_of,
)
from finetune_pipeline.settings import LoopSettings

MAX_PROMPTS = 200
"""Most prompts of one comparison: people have to read two answers to each."""

RENEW_SECONDS = 2.0
"""How often the row of a comparison shows how far it is."""

Side = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class BlindPair:
    """A pair as a voter sees it: which model wrote which answer is not said.

    Attributes:
        vote: the voter's own vote on it; None without one.
    """

    number: int
    prompt: str
    a: str
    b: str
    vote: Side | None


@dataclass(frozen=True)
class CountedVote:
    """A vote that was recorded, and the model for which it counts; None for a tie."""

    number: int
    vote: Side
    model: str | None


def request_comparison(
    loop: LoopSettings,
    base: str,
    tuned: str,
    created_by: str,
    prompts: Sequence[str] | None = None,
    idempotency_key: str | None = None,
) -> RequestedComparison:
    """Record that two models are to be compared; a process that serves the loop does it.

    Args:
        base: name of a version (`loop@v1.2.0`, `champion`, `previous`, `base`) or the first digits of a challenger's
            SHA-256. What `champion` and `previous` name is decided now.
        tuned: the same; it is compared with the other one.
        prompts: asks these; None asks the loop's benchmark.
        idempotency_key: a second call with the same key and arguments returns the same comparison.

    Raises:
        ComparisonError: both are the same model, or one is of another loop.
        RegistryError: there is no such model.
        BenchmarkError: the loop's benchmark cannot be read.
        RequestedComparisonError: the key was used for another request.
    """
    db = connect()
    models = []
    for name in (base, tuned):
        if name.rpartition("@")[0] not in {"", loop.name}:
            raise ComparisonError(f"{name} is a model of another loop than {loop.name}; compare models of one loop")
        models.append(find_trained(db, name, loop.name))
    if _id(models[0]) == _id(models[1]):
        raise ComparisonError(f"{base} and {tuned} are the same model; name two different ones")
    if prompts is None:
        loop_files.benchmark(loop)
    asked = {"base": base, "tuned": tuned, "prompts": list(prompts) if prompts is not None else None}
    return create_comparison(
        db,
        RequestedComparison(
            id=new_comparison_id(),
            loop=loop.name,
            base=_name(loop, models[0]),
            base_id=_id(models[0]),
            tuned=_name(loop, models[1]),
            tuned_id=_id(models[1]),
            prompts=asked["prompts"],
            created_by=created_by,
            idempotency_key=idempotency_key,
            request_sha256=hash_of(asked) if idempotency_key is not None else None,
            created_at=datetime.now(UTC),
        ),
    )


def run_comparison(loop: LoopSettings, id: str, log: Callable[[str], None]) -> RequestedComparison:
    """Do a comparison that waits, unless another process does; return it as it is then.

    Raises:
        UnknownComparisonError: there is none with this id.
        DatabaseError: the database cannot be used.
    """
    db = connect()
    lease = claim_comparison(db, id)
    if lease is not None:
        with _Renewal(lease) as renewal:
            try:
                _compare(loop, lease, renewal.on_progress, log)
            except (ComparisonLeaseLostError, DatabaseError) as error:
                log(str(error))
            except (*EXPECTED, OSError) as error:
                log(f"{id} failed: {error}")
                lease.fail(str(error))
            except Exception as error:
                lease.fail(f"unexpected error, a bug: {type(error).__name__}: {error}")
                raise
            except BaseException:  # told to end
                lease.give_back()
                raise
    return find_requested_comparison(db, id)


class _Renewal:
    """Keeps a lease from a thread, with the newest progress; the work ends at its next answer if the lease is lost."""

    def __init__(self, lease: ComparisonLease) -> None:
        self._lease = lease
        self._progress: dict[str, Any] = {}
        self._done = threading.Event()
        self._lost: ComparisonLeaseLostError | None = None
        self._thread = threading.Thread(target=self._renew, name="comparison-lease", daemon=True)

    def __enter__(self) -> "_Renewal":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def on_progress(self, model: str, answered: int, questions: int) -> None:
        self._progress = {"model": model, "answered": answered, "questions": questions}
        if self._lost is not None:
            raise self._lost

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            try:
                self._lease.renew(self._progress)
            except ComparisonLeaseLostError as lost:
                self._lost = lost
                return
            except DatabaseError:  # perhaps locked for a moment; the lease still holds for a while
                continue


def _compare(
    loop: LoopSettings,
    lease: ComparisonLease,
    on_progress: Callable[[str, int, int], None],
    log: Callable[[str], None],
) -> None:
    asked = lease.comparison
    if asked.prompts is not None:
        questions = tuple(
            OpenQuestion(id=str(number), slice="given", prompt=prompt)
            for number, prompt in enumerate(asked.prompts, start=1)
        )
        given = Benchmark((), hash_of(asked.prompts), questions)
        answers = [_answers(loop, name, given, on_progress, log) for name in (asked.base, asked.tuned)]
        lease.finish(_pairs(asked.id, list(zip(asked.prompts, *answers, strict=True))))
        return
    done = compare_two(loop, asked.base, asked.tuned, log, on_progress=on_progress)
    compared = done.comparison
    pairs = [(one.question.prompt, one.champion.text, one.challenger.text) for one in compared.questions]
    opened = zip(compared.open_questions, compared.champion.open_answers, compared.challenger.open_answers, strict=True)
    pairs += [(question.prompt, base.text, tuned.text) for question, base, tuned in opened]
    lease.finish(
        _pairs(asked.id, pairs),
        base_wins=done.record.losses,
        tuned_wins=done.record.wins,
        ties=done.record.ties,
        p_value=done.record.p_value,
        report=done.record.id,
    )


def _answers(
    loop: LoopSettings,
    name: str,
    prompts: Benchmark,
    on_progress: Callable[[str, int, int], None],
    log: Callable[[str], None],
) -> list[str]:
    contender = find_model(loop, connect(), name, log).contender
    assert isinstance(contender.spec, ModelSpec)

    def progress(answered: int, questions: int) -> None:
        on_progress(contender.name, answered, questions)

    run = answer_benchmark(
        contender.spec,
        prompts,
        loop.evaluation,
        loop.system_prompt,
        loop.name,
        progress,
        constraint=loop_files.constraint(loop),
        rejected_is_wrong=True,
    )
    return [answer.text for answer in run.open_answers]


def _pairs(id: str, answers: Sequence[tuple[str, ...]]) -> list[ComparedPair]:
    return [
        ComparedPair(
            comparison_id=id,
            number=number,
            prompt=prompt,
            base_answer=base,
            tuned_answer=tuned,
            swapped=random.random() < 0.5,
        )
        for number, (prompt, base, tuned) in enumerate(answers, start=1)
    ]


def blind_pairs(db: Database, id: str, voter: str, after: int = 0, limit: int | None = None) -> list[BlindPair]:
    """Return the pairs of a comparison with numbers above `after`, as this voter sees them."""
    mine = {vote.number: vote.choice for vote in votes_of(db, id, voter)}
    found = []
    for pair in pairs_of(db, id, after, limit):
        a, b = (pair.tuned_answer, pair.base_answer) if pair.swapped else (pair.base_answer, pair.tuned_answer)
        vote = _side(pair, mine[pair.number]) if pair.number in mine else None
        found.append(BlindPair(pair.number, pair.prompt, a, b, vote))
    return found


@dataclass(frozen=True)
class ComparisonReport:
    """The report of a comparison on the benchmark.

    Attributes:
        page: the HTML file.
        rows: the metrics; `champion` is the first model, `challenger` the one that is compared with it.
    """

    page: Path
    rows: Sequence[MetricRow]


def report_of(db: Database, comparison: RequestedComparison) -> ComparisonReport | None:
    """Return the report of a comparison; None for given prompts, before the end, and if its files were deleted."""
    made = list_manual_comparisons(db, comparison.loop) if comparison.report else []
    page = next((one.report_path for one in made if one.id == comparison.report), None)
    if page is None:
        return None
    try:
        return ComparisonReport(page, metrics_of_report(page.with_name(JSON)).rows)
    except ReportError:
        return None


def vote(db: Database, id: str, number: int, side: Side, voter: str) -> CountedVote:
    """Record which answer of a pair somebody prefers, and return for which model that counts.

    Each voter has one vote on a pair. It cannot be changed, because the answer to it says which model wrote what.

    Raises:
        UnknownComparisonError: there is no such comparison or pair.
        RequestedComparisonError: the comparison has no answers yet, or the voter voted otherwise before.
    """
    comparison = find_requested_comparison(db, id)
    if comparison.status != "completed":
        raise RequestedComparisonError(f"the comparison {id} is {comparison.status}; it has no answers to vote on")
    pair = next(iter(pairs_of(db, id, number - 1, 1)), None)
    swapped = pair is not None and pair.swapped
    choices: dict[Side, Choice] = {
        "a": "tuned" if swapped else "base",
        "b": "base" if swapped else "tuned",
        "tie": "tie",
    }
    wanted = ComparisonVote(
        comparison_id=id, number=number, voter=voter, choice=choices[side], created_at=datetime.now(UTC)
    )
    recorded = record_vote(db, wanted)
    if recorded.choice != wanted.choice:
        raise RequestedComparisonError(
            f"{voter} voted otherwise on pair {number} at {recorded.created_at:%Y-%m-%d %H:%M} UTC; a vote cannot be "
            "changed"
        )
    return CountedVote(number, side, {"base": comparison.base, "tuned": comparison.tuned, "tie": None}[wanted.choice])


def _side(pair: ComparedPair, choice: Choice) -> Side:
    if choice == "tie":
        return "tie"
    return "a" if (choice == "tuned") == pair.swapped else "b"


def _id(model: CandidateModel | None) -> str | None:
    return model.id if model else None


def _name(loop: LoopSettings, model: CandidateModel | None) -> str:
    return model.name if model else f"{loop.name}@{BASE}"
