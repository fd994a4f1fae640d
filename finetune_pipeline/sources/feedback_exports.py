"""Convert a row of another tool's feedback export to events.

    Open WebUI, Evaluations > Feedback > Export (`models/feedbacks.py`: FeedbackModel with its snapshot of the chat):
    {"id", "user_id", "type": "rating", "data": {"rating": 1 or -1, ...}, "meta": {"chat_id", "message_id", ...},
     "snapshot": {"chat": {"chat": {"history": {"messages": {...}}}}}, "created_at", "updated_at"}

    Langfuse, traces and observations with their corrected outputs, and exported scores (public API, and JSON or CSV of
    the UI; a corrected output is a score of the type CORRECTION):
    {"id", "input", "output", "userId", "timestamp", "scores": [...], "observations": [...]}       a trace
    {"id", "traceId", "input", "output", "startTime", "model", "scores": [...]}                     an observation
    {"id", "traceId", "observationId", "dataType": "CORRECTION", "stringValue", "authorUserId"}     a score
    {"id", "subject": {"kind", "id"}, "dataType": "CORRECTION", "value", "authorUserId"}    the same of version 3

Ids follow from those of the tool, so scores may come before their traces, and an export that is read again adds
nothing. A rating or correction that was changed there is later feedback.
"""

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from finetune_pipeline.records import Feedback, FeedbackKind, Interaction, Turn, not_in_future
from finetune_pipeline.tool_calls import unsupported_part
from finetune_pipeline.validation_messages import error_message, short_repr
from finetune_pipeline.wording import kind_of

ExportFormat = Literal["open_webui", "langfuse"]

_NAMESPACE = uuid.UUID("0c1f3c52-7c3b-4c57-9e3e-0d7c5f6b2a11")  # random; of this module's name-based ids
_TRACE_FIELDS = {"timestamp", "startTime", "traceId", "projectId", "userId", "sessionId", "scores", "observations"}
_TOOL_CALLS = re.compile(r'<details\s[^>]*?type="(?:tool_calls|code_interpreter)"')
_REASONING = re.compile(r'<details\s[^>]*?type="reasoning"[^>]*>.*?</details>\s*', re.DOTALL)
_RETRIEVED = ("sources", "citations")  # of an answer of Open WebUI: the documents and pages that were found for it
_LAST_SECOND = 253_402_300_799  # of the year 9999; a larger number is in milliseconds or nanoseconds


def export_format(row: Any) -> ExportFormat | None:
    """Return the tool whose export a row is of, by its fields; None for any other row."""
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("data"), Mapping) and isinstance(row.get("meta"), Mapping) and "user_id" in row:
        return "open_webui"
    if row.get("dataType") is not None and {"traceId", "observationId", "subject"} & row.keys():
        return "langfuse"
    is_trace = {"id", "input", "output"} <= row.keys() and _TRACE_FIELDS & row.keys()
    return "langfuse" if is_trace and "instruction" not in row else None  # Alpaca has `input` and `output`, too


def export_events(row: Any, loop: str, form: ExportFormat) -> tuple[Interaction | Feedback, ...]:
    """Return the interactions of a row, and the feedback on them.

    Raises:
        ValueError: a field is missing or invalid, or the row is of something else than the answers of a model.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"found {kind_of(row)}, expected a JSON object")
    try:
        return tuple(_open_webui(row, loop) if form == "open_webui" else _langfuse(row, loop))
    except ValidationError as error:
        raise ValueError(error_message(error)) from None


# --- Open WebUI -------------------------------------------------------------------------------------------------------


def _open_webui(row: Mapping[str, Any], loop: str) -> Iterator[Interaction | Feedback]:
    thumbs: dict[str, FeedbackKind] = {"1": "thumbs_up", "-1": "thumbs_down"}
    given = _object(row, "data").get("rating")
    rating = thumbs.get(str(given).strip().removesuffix(".0"))  # pandas writes a column with missing values as floats
    if rating is None:
        found = "null" if given is None else short_repr(given)
        raise ValueError(f"data.rating: found {found}, expected 1 or -1 (a rating of Open WebUI)")
    meta, chat = _object(row, "meta"), _object(_object(row, "snapshot"), "chat")
    content = chat.get("chat", chat)  # the chat itself, below its title and owner
    messages = _object(_object(content, "history"), "messages")
    message_id = str(meta.get("message_id"))
    thread = _thread(messages, message_id)
    if len(thread) < 2 or thread[-1].get("role") != "assistant" or thread[-2].get("role") != "user":
        raise ValueError(
            f"snapshot.chat: the rated message {short_repr(message_id)} is not an answer to a user's message there"
        )
    *history, asked, answer = thread
    if found := unsupported_part({"messages": thread}) or _tool_calls_in(thread) or _retrieved_for(answer):
        raise ValueError(found)
    # An edited answer keeps the model's own text.
    written, edited = _said(answer), answer.get("originalContent")
    output = _REASONING.sub("", edited) if isinstance(edited, str) and edited.strip() else written
    if not output.strip():
        raise ValueError("content: the rated answer has no text" + (" but its reasoning" if answer["content"] else ""))
    moment = _time(row, "updated_at", "created_at")
    id = _id(loop, "open_webui", meta.get("chat_id") or chat.get("id"), message_id)
    yield Interaction(
        id=id,
        loop=loop,
        created_at=_time(answer, "timestamp", default=moment),
        prompt=_text(asked, "content"),
        history=tuple(Turn.model_validate({"role": turn.get("role"), "content": _said(turn)}) for turn in history),
        output=output,
        model=answer.get("model") or meta.get("model_id"),
        user=chat.get("user_id") or row.get("user_id"),
    )
    common: dict[str, Any] = {"loop": loop, "interaction_id": id, "created_at": moment, "user": row.get("user_id")}
    said = {name: row["data"][name] for name in ("reason", "comment", "tags") if row["data"].get(name)}
    thumb = _id(loop, "open_webui", row.get("id"), rating, moment)
    yield Feedback(id=thumb, kind=rating, metadata=said or None, **common)
    if written.strip() != output.strip():
        correction = _id(loop, "open_webui", row.get("id"), written)
        yield Feedback(id=correction, kind="correction", correction=written, **common)


def _tool_calls_in(thread: Sequence[Mapping[str, Any]]) -> str:
    """Return why a chat cannot be used: Open WebUI writes tool calls into the text of an answer, as HTML."""
    texts = (turn.get(name) for turn in thread for name in ("content", "originalContent"))
    found = any(isinstance(text, str) and _TOOL_CALLS.search(text) for text in texts)
    return "has tool calls in a text; tool calls are not supported yet" if found else ""


def _retrieved_for(answer: Mapping[str, Any]) -> str:
    """Return why an answer cannot be used whose prompt, as it was logged, lacks what the model was given."""
    found = next((name for name in _RETRIEVED if answer.get(name)), None)
    return f"has {found}: the answer is about retrieved texts, which the prompt does not contain" if found else ""


def _said(message: Mapping[str, Any]) -> str:
    """Return the text of a message without the model's reasoning, which Open WebUI writes into it as HTML."""
    text = _text(message, "content")
    return _REASONING.sub("", text) if message.get("role") == "assistant" else text


def _thread(messages: Mapping[str, Any], last: str) -> list[Mapping[str, Any]]:
    """Return a message and those before it, the first one first."""
    thread: list[Mapping[str, Any]] = []
    while isinstance(message := messages.get(last), Mapping) and message not in thread:
        thread.insert(0, message)
        last = str(message.get("parentId"))
    return thread


# --- Langfuse ---------------------------------------------------------------------------------------------------------


def _langfuse(row: Mapping[str, Any], loop: str) -> Iterator[Interaction | Feedback]:
    if "dataType" in row:
        if row["dataType"] != "CORRECTION":
            raise ValueError(
                f"dataType: found {short_repr(row['dataType'])}, expected CORRECTION: of Langfuse's scores only "
                "corrected outputs are read"
            )
        yield _correction(row, loop)
        return
    scores = [score for score in _rows(row, "scores") if score.get("dataType") == "CORRECTION"]
    corrected = {score.get("observationId") for score in scores}
    yield _answer(row, loop, "traceId" in row)
    for observation in _rows(row, "observations"):
        if observation.get("id") in corrected:
            yield _answer({"userId": row.get("userId"), **observation}, loop, True)
    for score in scores:
        yield _correction({"traceId": row.get("traceId", row.get("id")), **score}, loop)


def _answer(row: Mapping[str, Any], loop: str, is_observation: bool) -> Interaction:
    *history, asked = _turns(_required(row, "input"), "user")
    output = _turns(_required(row, "output"), "assistant")[-1]
    if asked["role"] != "user":
        raise ValueError(f"input: its last message is of {short_repr(asked['role'])}, expected one of the user")
    return Interaction(
        id=_id(loop, "langfuse", "observation" if is_observation else "trace", row.get("id")),
        loop=loop,
        created_at=_time(row, "endTime", "startTime", "timestamp", "createdAt"),
        prompt=asked["content"],
        history=tuple(map(Turn.model_validate, history)),
        output=output["content"],
        model=row.get("model") or row.get("providedModelName"),
        user=row.get("userId"),
    )


def _correction(score: Mapping[str, Any], loop: str) -> Feedback:
    texts = (score.get(name) for name in ("longStringValue", "stringValue", "value"))
    text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if text is None:
        raise ValueError("stringValue: expected the corrected output, as `stringValue` or `value`")
    subject = score.get("subject")  # in version 3 of the API
    if isinstance(subject, Mapping):
        if subject.get("kind") not in {"trace", "observation"}:
            raise ValueError(f"subject.kind: found {short_repr(subject.get('kind'))}, expected trace or observation")
        score = {**score, f"{subject['kind']}Id": subject.get("id")}
    observation, trace = score.get("observationId"), score.get("traceId")
    if not (observation or trace):
        raise ValueError("traceId, observationId: both are missing; one of them names the answer that is corrected")
    about = ("observation", observation) if observation else ("trace", trace)
    return Feedback(
        id=_id(loop, "langfuse", "score", score.get("id"), text),
        loop=loop,
        interaction_id=_id(loop, "langfuse", *about),
        created_at=_time(score, "updatedAt", "timestamp", "createdAt"),
        kind="correction",
        correction=text,
        user=score.get("authorUserId"),
        metadata={"comment": score["comment"]} if score.get("comment") else None,
    )


def _turns(value: Any, role: str) -> list[dict[str, str]]:
    """Return the messages of an input or output; any other JSON is one message, as text."""
    given = value
    if isinstance(given, str) and given.lstrip()[:1] in {"[", "{"}:  # a cell of CSV
        with suppress(ValueError, RecursionError):
            given = json.loads(given)
    if isinstance(given, Mapping):
        choices = given.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
            given = choices[0].get("message", given)
        elif "messages" in given:
            if found := unsupported_part(given):  # the definitions of tools stand beside the messages
                raise ValueError(found)
            given = given["messages"]
    turns = given if isinstance(given, list) else [given]
    are_messages = any(isinstance(turn, Mapping) and {"role", "content"} & turn.keys() for turn in turns)
    if are_messages and (found := unsupported_part({"messages": turns})):
        raise ValueError(found)
    if turns and all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
        return [{"role": str(turn.get("role", role)), "content": _text(turn, "content")} for turn in turns]
    return [{"role": role, "content": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}]


# --- Fields -----------------------------------------------------------------------------------------------------------


def _object(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = row.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: found {kind_of(value)}, expected an object")
    return value


def _rows(row: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    value = row.get(name)  # a list of ids where the API returns many traces, and names with values in the UI's export
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _required(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) in (None, "", [], {}):
        raise ValueError(f"{name}: is missing or empty")
    return row[name]


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):  # content parts
        parts = [part["text"] for part in value if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        value = "".join(parts) if len(parts) == len(value) else value  # an image is no text
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {kind_of(value)}, expected a text")
    return value


def _time(row: Mapping[str, Any], *names: str, default: datetime | None = None) -> datetime:
    """Return the first of these fields as a time: ISO 8601, or seconds, milliseconds or nanoseconds since 1970.

    Raises:
        ValueError: none is there, or it is no time, or in the future.
    """
    name, value = next(((name, row[name]) for name in names if row.get(name) is not None), ("", default))
    if isinstance(value, datetime):
        return value
    if value is None:
        missing = (
            f"none of {', '.join(names)}; expected one of them" if len(names) > 1 else f"no {names[0]}; expected it"
        )
        raise ValueError(f"found {missing} with a time")
    try:
        if isinstance(value, str) and not value.replace(".", "", 1).isdigit():
            moment = datetime.fromisoformat(value)
        else:
            seconds = float(value)
            while seconds > _LAST_SECOND:
                seconds /= 1_000
            moment = datetime.fromtimestamp(seconds, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        raise ValueError(
            f"{name}: found {short_repr(value)}, expected a time (ISO 8601, or seconds since 1970)"
        ) from None
    try:
        return not_in_future(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _id(loop: str, *parts: object) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, json.dumps([loop, *map(str, parts)]))
