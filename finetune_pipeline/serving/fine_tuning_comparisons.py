"""The fine-tuning API's comparisons: two models on the benchmark or on given prompts, and blind votes on their answers.

A comparison is a row from the request on. The gateway does one at a time in a child process (`serving.comparer`).
"""

import asyncio
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, Field

from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.pipeline.comparisons import MAX_PROMPTS, Side, blind_pairs, request_comparison, vote
from finetune_pipeline.records import Text
from finetune_pipeline.registry import requested_comparisons
from finetune_pipeline.registry.requested_comparisons import (
    ComparisonStatus,
    RequestedComparison,
    RequestedComparisonError,
    UnknownComparisonError,
    count_votes,
    find_requested_comparison,
    list_requested_comparisons,
    votes_of,
)
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.serving import api
from finetune_pipeline.serving.errors import BadRequest, Conflict, NotFound
from finetune_pipeline.serving.fine_tuning import Admin, Reader, Voter, idempotency_key, page_of
from finetune_pipeline.serving.fine_tuning_models import model_errors, named_model
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline.serving.http import get_gateway, json_body

COMPARISONS_PATH = "/v1/fine-tuning/comparisons"
_COMPARISON_PATH = COMPARISONS_PATH + "/{comparison_id}"

router = APIRouter()

ComparisonId = Annotated[str, Path(pattern="^cmp-[0-9a-f]{24}$")]
GivenModel = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")]
GivenPrompt = Annotated[Text, Field(min_length=1, max_length=20_000)]


# --- Schemas ----------------------------------------------------------------------------------------------------------


class NewComparison(api.Request):
    """POST /v1/fine-tuning/comparisons."""

    tuned: GivenModel = Field(description="The model to compare: a version, a challenger, or LOOP@champion.")
    base: GivenModel | None = Field(
        default=None, description="The model to compare it with, of the same loop; default: the loop's base model."
    )
    prompts: Annotated[list[GivenPrompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)] | None = Field(
        default=None, description="Prompts to ask both; default: the loop's benchmark."
    )


class ComparisonProgress(BaseModel):
    """How far a comparison is; a benchmark is asked of up to three models, and then timed."""

    model: str
    answered: int
    questions: int


class ComparisonScores(BaseModel):
    """The result on the benchmark, by the loop's metric."""

    base_wins: int = Field(description="Questions in which its score is higher.")
    tuned_wins: int
    ties: int
    p_value: float | None = Field(description="One-sided, that the tuned model is not better.")
    report: str | None = Field(description="Version of the report.")


class ComparisonVotes(BaseModel):
    """The result of blind votes on the pairs of answers."""

    base_wins: int
    tuned_wins: int
    ties: int
    voters: list[str]


class FineTuningComparison(BaseModel):
    """A comparison of two models. It judges no data and promotes nothing."""

    id: str
    object: Literal["fine_tuning.comparison"] = "fine_tuning.comparison"
    loop: str
    base: str
    tuned: str
    questions: Literal["benchmark", "prompts"]
    status: ComparisonStatus
    progress: ComparisonProgress | None = Field(description="Null before the first answer.")
    error: str
    scores: ComparisonScores | None = Field(description="Null for given prompts, and before the end.")
    votes: ComparisonVotes
    created_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class FineTuningComparisonList(BaseModel):
    """Comparisons, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningComparison]
    has_more: bool


class BlindAnswers(BaseModel):
    """Two answers to one prompt; which model wrote which one is said by the answer to the vote."""

    number: int
    prompt: str
    a: str
    b: str
    vote: Side | None = Field(description="The vote of this API key; null if it has not voted.")


class BlindAnswersList(BaseModel):
    """Pairs of a comparison, by their number."""

    object: Literal["list"] = "list"
    data: list[BlindAnswers]
    has_more: bool


class NewVote(api.Request):
    """POST /v1/fine-tuning/comparisons/{id}/votes."""

    pair: Annotated[int, Field(ge=1, lt=2**31), api.Whole] = Field(description="Number of the pair.")
    choice: Side = Field(description="Which answer is better.")


class RecordedVote(BaseModel):
    """A vote that counts."""

    pair: int
    choice: Side
    model: str | None = Field(description="The model that wrote the chosen answer; null for a tie.")
    votes: ComparisonVotes


BODIES: dict[str, type[BaseModel]] = {COMPARISONS_PATH: NewComparison, f"{_COMPARISON_PATH}/votes": NewVote}
"""The body of each POST."""


# --- Routes -----------------------------------------------------------------------------------------------------------


@router.post(COMPARISONS_PATH)
async def create_comparison(
    request: Request, caller: Admin, body: Annotated[NewComparison, Depends(json_body(NewComparison))]
) -> FineTuningComparison:
    """Compare two models on the loop's benchmark, or on given prompts; the result is there when it is completed.

    A repeated request with the same header `Idempotency-Key` returns the comparison of the first one.
    """
    gateway = get_gateway(request)
    key = idempotency_key(request)

    def create() -> FineTuningComparison:
        loop, tuned = named_model(gateway, body.tuned)
        base = f"{loop.name}@base"
        if body.base is not None:
            other, base = named_model(gateway, body.base)
            if other.name != loop.name:
                raise BadRequest(f"base: is a model of {other.name}, and tuned one of {loop.name}.", param="base")
        with model_errors():
            try:
                made = request_comparison(loop, base, tuned, caller.name, body.prompts, key)
            except ComparisonError as error:
                raise BadRequest(f"tuned: {error}.", param="tuned") from error
            except (BenchmarkError, SchemaError) as error:
                raise Conflict(f"The benchmark of {loop.name} cannot be used", detail=error) from error
            except RequestedComparisonError as error:
                raise Conflict(f"{error}.") from error
        return _comparison_object(gateway, made)

    return await asyncio.to_thread(create)


@router.get(COMPARISONS_PATH)
async def list_comparisons(
    request: Request,
    _: Reader,
    loop: Annotated[str | None, Query(max_length=60)] = None,
    status: ComparisonStatus | None = None,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> FineTuningComparisonList:
    """List the comparisons, newest first."""
    gateway = get_gateway(request)
    loops = [gateway.loop_named(loop).name] if loop is not None else list(gateway.loops)

    def read() -> FineTuningComparisonList:
        found = list_requested_comparisons(gateway.database, loops, [status] if status else ())
        page, has_more = page_of(found, after, limit)
        return FineTuningComparisonList(data=[_comparison_object(gateway, one) for one in page], has_more=has_more)

    return await asyncio.to_thread(read)


@router.get(_COMPARISON_PATH)
async def retrieve_comparison(request: Request, _: Reader, comparison_id: ComparisonId) -> FineTuningComparison:
    """Return a comparison with its progress, or its result."""
    gateway = get_gateway(request)
    return await asyncio.to_thread(lambda: _comparison_object(gateway, _find(gateway, comparison_id)))


@router.post(_COMPARISON_PATH + "/cancel")
async def cancel_comparison(request: Request, _: Admin, comparison_id: ComparisonId) -> FineTuningComparison:
    """Cancel a comparison that has not ended."""
    gateway = get_gateway(request)

    def cancel() -> FineTuningComparison:
        _find(gateway, comparison_id)
        try:
            found = requested_comparisons.cancel_comparison(gateway.database, comparison_id)
        except RequestedComparisonError as error:
            raise Conflict(f"{error}.") from error
        return _comparison_object(gateway, found)

    return await asyncio.to_thread(cancel)


@router.get(_COMPARISON_PATH + "/pairs")
async def list_pairs(
    request: Request,
    caller: Voter,
    comparison_id: ComparisonId,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BlindAnswersList:
    """List the pairs of answers with numbers above `after`, without the names of the models."""
    gateway = get_gateway(request)

    def read() -> BlindAnswersList:
        _find(gateway, comparison_id)
        found = blind_pairs(gateway.database, comparison_id, caller.name, after, limit + 1)
        data = [BlindAnswers(number=one.number, prompt=one.prompt, a=one.a, b=one.b, vote=one.vote) for one in found]
        return BlindAnswersList(data=data[:limit], has_more=len(data) > limit)

    return await asyncio.to_thread(read)


@router.post(_COMPARISON_PATH + "/votes")
async def vote_on_pair(
    request: Request,
    caller: Voter,
    comparison_id: ComparisonId,
    body: Annotated[NewVote, Depends(json_body(NewVote))],
) -> RecordedVote:
    """Record which answer of a pair is better, and return which model wrote it.

    Each API key has one vote on a pair. The same vote again changes nothing, and another one is 409.
    """
    gateway = get_gateway(request)

    def record() -> RecordedVote:
        _find(gateway, comparison_id)
        try:
            counted = vote(gateway.database, comparison_id, body.pair, body.choice, caller.name)
        except UnknownComparisonError as error:
            raise NotFound(f"{error}.", param="pair") from error
        except RequestedComparisonError as error:
            raise Conflict(f"{error}.") from error
        votes = _votes(gateway, comparison_id)
        return RecordedVote(pair=counted.number, choice=counted.vote, model=counted.model, votes=votes)

    return await asyncio.to_thread(record)


def _find(gateway: Gateway, id: str) -> RequestedComparison:
    """Return a comparison of a loop that is served here."""
    try:
        found = find_requested_comparison(gateway.database, id)
    except UnknownComparisonError as error:
        raise NotFound(f"{error}.", param="comparison_id") from error
    if found.loop not in gateway.loops:
        raise NotFound(f"The comparison {id} is of the loop {found.loop}, which is not served here.")
    return found


def _votes(gateway: Gateway, id: str) -> ComparisonVotes:
    counts = count_votes(votes_of(gateway.database, id))
    return ComparisonVotes(
        base_wins=counts.base_wins, tuned_wins=counts.tuned_wins, ties=counts.ties, voters=list(counts.voters)
    )


def _comparison_object(gateway: Gateway, one: RequestedComparison) -> FineTuningComparison:
    scores = None
    if one.base_wins is not None and one.tuned_wins is not None and one.ties is not None:
        scores = ComparisonScores(
            base_wins=one.base_wins, tuned_wins=one.tuned_wins, ties=one.ties, p_value=one.p_value, report=one.report
        )
    fields = ("id", "loop", "base", "tuned", "status", "error", "created_by", "created_at", "started_at", "finished_at")
    return FineTuningComparison(
        questions="benchmark" if one.prompts is None else "prompts",
        progress=ComparisonProgress.model_validate(one.progress) if one.progress else None,
        scores=scores,
        votes=_votes(gateway, one.id),
        **{name: getattr(one, name) for name in fields},
    )
