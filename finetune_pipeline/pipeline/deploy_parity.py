"""Compare a release that is staged on a target with the judged model: the same tokens, and the same answers.

A target is switched only after this, so that what serves there is what the benchmark judged.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_pipeline.deployment.target import Release, Target, TargetError
from finetune_pipeline.evaluation.benchmark import Benchmark
from finetune_pipeline.evaluation.comparison import BenchmarkAnswer
from finetune_pipeline.evaluation.equivalence import Equivalence, score_differences
from finetune_pipeline.evaluation.run import answer_benchmark, answer_remotely
from finetune_pipeline.export.parity import (
    CONTROL_TOKENS,
    TokenDifference,
    compare_answers,
    compare_tokens,
    parity_conversations,
)
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import Message, chat_messages
from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.settings import LoopSettings, UpstreamSettings
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Number of this comparison. Raise it when the comparison changes, so that results of an earlier one are not reused."""

_QUOTED_CHARACTERS = 400
_FIRST_PROMPT = "How thick is the wall?"


class ParityError(RuntimeError):
    """A staged release differs from the judged model; the message shows both.

    Attributes:
        facts: the results so far, for the target's row.
    """

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


def check_parity(
    loop: LoopSettings,
    release: Release,
    target: Target,
    endpoint: UpstreamSettings | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Compare a staged release with the judged model, and return the results.

    Token ids of conversations of every kind have to be those of the base model's tokenizer, if the target can tell
    them. A difference in conversations with control tokens alone is a fact and not an error. Answers to
    `deploy.parity_sample` benchmark questions have to equal the judged model's on `export.min_agreement` of them, and
    their score must not be lower by `export.equivalence_margin`.

    Args:
        endpoint: where the staged release answers; None if it answers no requests.

    Raises:
        ParityError: it differs from the judged model.
        TargetError: the target does not answer.
        EngineError: the endpoint does not answer, or the judged model's answers are not stored and cannot be made.
    """
    benchmark = loop_files.benchmark(loop)
    sample = benchmark.sample_of(loop.deploy.parity_sample)
    facts = _check_tokens(loop, release, target, sample, log)
    if endpoint is not None:
        facts |= _check_answers(loop, release, endpoint, benchmark, sample, facts, log)
    return facts


def _check_tokens(
    loop: LoopSettings, release: Release, target: Target, sample: Benchmark, log: Callable[[str], None]
) -> dict[str, Any]:
    if not _tells_tokens(target, release, chat_messages(loop.system_prompt, _FIRST_PROMPT)):
        return {"reads_control_tokens": None}

    def encode(messages: list[Message]) -> list[int]:
        ids = target.prompt_tokens(release, messages)
        if ids is None:
            raise TargetError(f"the target {target.name} returned token ids for one conversation and none for another")
        return ids

    tokenizer = load_tokenizer(release.base_folder)
    chats = [question.messages(loop.system_prompt) for question in sample.questions]
    found = compare_tokens(tokenizer, encode, parity_conversations(tokenizer, loop.system_prompt, chats))
    control = [one for one in found.differences if one.kind == CONTROL_TOKENS]
    others = [one for one in found.differences if one.kind != CONTROL_TOKENS]
    compared = sum(found.compared.values())
    facts = {
        "tokens": {"compared": compared, "differing": len(others), "refused": found.refused},
        "reads_control_tokens": bool(control),
    }
    if others:
        raise ParityError(
            f"the target reads {len(others)} of {counted(compared, 'conversation')} as other tokens than the judged "
            f"model ({', '.join(sorted({one.kind for one in others}))}), so its answers would be of another model: "
            f"{_both_renderings(tokenizer, others[0])}. Correct the server's chat template or tokenizer",
            facts,
        )
    log(f"{counted(compared, 'conversation')} compared: the same tokens" + (", except control tokens" * bool(control)))
    return facts


def _tells_tokens(target: Target, release: Release, messages: list[Message]) -> bool:
    try:
        return target.prompt_tokens(release, messages) is not None
    except RequestRefused:
        return True


def _both_renderings(tokenizer: "PreTrainedTokenizerBase", difference: TokenDifference) -> str:
    def rendering(ids: Sequence[int]) -> str:
        return short_repr(tokenizer.decode(ids), _QUOTED_CHARACTERS) if ids else "refused"

    return (
        f"for the message {short_repr(difference.text, 60)} expected {rendering(difference.expected)} "
        f"({counted(len(difference.expected), 'token')}), found {rendering(difference.found)} "
        f"({counted(len(difference.found), 'token')})"
    )


def _check_answers(
    loop: LoopSettings,
    release: Release,
    endpoint: UpstreamSettings,
    benchmark: Benchmark,
    sample: Benchmark,
    facts: dict[str, Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    constraint = loop_files.constraint(loop)
    spec = ModelSpec(gguf=release.gguf, adapter=release.adapter_gguf)
    common = (loop.evaluation, loop.system_prompt, loop.name)
    judged = answer_benchmark(spec, benchmark, *common, constraint=constraint)
    if not judged.reused:
        log("the judged model's answers were not stored, so it answered the benchmark again")
    wanted = {one.id for one in sample.questions}
    expected = [one.text for one in judged.answers if one.id in wanted]
    try:
        run = answer_remotely(endpoint, sample, *common, constraint=constraint)
    except RequestRefused as refused:
        raise ParityError(
            f"the judged model answers every question, and the target refuses: {refused}", facts
        ) from refused
    found = [one.text for one in run.answers]
    structured = loop.output_schema is not None
    agreement = compare_answers([_value(text, structured) for text in expected], [_value(t, structured) for t in found])
    scorer = loop_files.scorer(loop)

    def scores(texts: Sequence[str]) -> list[float]:
        counts = (scorer.count(one, text) for one, text in zip(sample.questions, texts, strict=True))
        return [one.correct / one.total if one.total else 0.0 for one in counts]

    judged_scores, own_scores = scores(expected), scores(found)
    result = Equivalence(score_differences(judged_scores, own_scores), loop.export.equivalence_margin)
    facts = {
        **facts,
        "answers": {
            "same": agreement.same,
            "total": agreement.total,
            "score": sum(own_scores) / len(own_scores),
            "judged_score": sum(judged_scores) / len(judged_scores),
        },
        "answers_in": str(run.path),
    }
    numbers = f"{agreement.same} of {counted(agreement.total, 'answer')} equal the judged model's"
    if agreement.fraction < loop.export.min_agreement:
        index = agreement.offenders[0]
        raise ParityError(
            f"{numbers}, expected at least {loop.export.min_agreement:.0%} (export.min_agreement): to "
            f"{short_repr(sample.questions[index].prompt, 60)} the judged model answered "
            f"{short_repr(expected[index], _QUOTED_CHARACTERS)}, and {endpoint.url}, model {endpoint.model}, "
            f"{short_repr(found[index], _QUOTED_CHARACTERS)}{_refusal(run.answers[index])}. All answers are in "
            f"{run.path}. Check the server's sampling settings, quantization and chat template",
            facts,
        )
    if not result.tolerable_loss:
        raise ParityError(
            f"{numbers}, but the score is lower than the judged model's ({result.sentence}; "
            f"export.equivalence_margin). All answers are in {run.path}",
            facts,
        )
    log(f"{numbers}; score {facts['answers']['score']:.1%}, judged {facts['answers']['judged_score']:.1%}")
    return facts


def _value(text: str, structured: bool) -> str:
    """Return an answer in a form that is equal for equal answers: JSON may differ in white space and order of keys."""
    if structured:
        try:
            return json.dumps(parse_json(text), sort_keys=True)
        except InvalidJsonError:
            pass
    return text


def _refusal(answer: BenchmarkAnswer) -> str:
    return f" (refused: {answer.refused})" if answer.refused else ""
