r"""Convert a row of a published format to a record, by the fields of the row.

Formats:

    {"instruction", "input", "output"[, "system", "history"]}           alpaca
    {"prompt", "completion" or "response" or "output"[, "history"]}     prompt_completion; both may be lists of messages
    {"conversations": [{"from", "value"}, ...][, "system"]}             sharegpt
    {"messages": [{"role", "content"}, ...]}                            messages, as in OpenAI's API
    {"text": "<|im_start|>user\n...<|im_end|>..."}                      messages, as one text in ChatML

A row may also have a `reward` (-1 to 1), a `correction` (what the answer should have been), `user`, `domain`, `kind`
and `created_at`. Other fields are ignored. The last turn of the assistant is the answer, the turn before it the prompt,
and everything before them the history. An answer or correction that is a JSON object is taken
as its text.

In a turn, `weight: 0`, or `train`, `trainable` or `loss` of false, makes its answer context only: the last answer
without it is the target. In a row, it excludes the row from training. So do tool calls, definitions of tools, and
refusals: see `tool_calls`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from finetune_pipeline.alpaca import alpaca_prompt, history_messages
from finetune_pipeline.records import PastUtcDatetime, ShortText, Text, Turn, loss_mask_field
from finetune_pipeline.settings import FileFormat
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.tool_calls import unsupported_part
from finetune_pipeline.validation_messages import error_message, short_repr
from finetune_pipeline.wording import kind_of

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
_CHATML = "<|im_start|>"
_CHATML_TURN = re.compile(r"<\|im_start\|>([^\n<]*)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ANSWER_FIELDS = ("completion", "response", "output")


class ExcludedRowError(ValueError):
    """A row is well-formed, but nothing of it may or can be trained on."""


class _Conversation(NamedTuple):
    """History, prompt and answer of a row, and the field that excludes a later answer from training."""

    history: list[Turn]
    prompt: Any
    answer: Any
    excluded_answer: str = ""


class _Message(NamedTuple):
    """A turn, and the reason why it is only context; empty if it may be the target."""

    turn: Turn
    context: str = ""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


_NonBlankText = Annotated[Text, Field(strict=True), AfterValidator(_not_blank)]


class _ConvertedRow(BaseModel):
    """The fields of a row after its format is converted."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, coerce_numbers_to_str=True)

    prompt: _NonBlankText
    answer: _NonBlankText
    correction: _NonBlankText | None = None
    reward: float | None = Field(default=None, ge=-1, le=1)
    user: ShortText | None = None
    domain: ShortText | None = None
    kind: ShortText | None = None
    created_at: PastUtcDatetime | None = None


def to_record(row: Any, provenance: str, form: FileFormat = "auto") -> SourceRecord:
    """Return the conversation of a row.

    Args:
        form: the row's format; auto detects it from the fields.

    Raises:
        ExcludedRowError: no answer of the row may be trained on, or the row has tool calls or a refusal.
        ValueError: the row has no known format, or a field is missing, empty or of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"found {kind_of(row)}, expected a JSON object")
    if found := unsupported_part(row):
        raise ExcludedRowError(found)
    said = _conversation(row, _format_of(row) if form == "auto" else form)
    if mark := loss_mask_field(row):
        raise ExcludedRowError(f"the row is excluded from training ({mark})")
    try:
        answers = {"answer": _as_text(said.answer), "correction": _as_text(row.get("correction"))}
        fields = _ConvertedRow.model_validate({**row, "prompt": said.prompt, **answers})
    except ValidationError as error:
        raise ValueError(error_message(error)) from None
    corrected = fields.correction is not None
    if corrected and said.excluded_answer:
        raise ValueError(
            f"correction: it corrects the last answer, which is excluded from training ({said.excluded_answer})"
        )
    return SourceRecord(
        provenance, fields.prompt, fields.correction or fields.answer, tuple(said.history),
        reward=None if corrected else fields.reward,  # the row's reward is of the answer before the correction
        model_output=fields.answer if corrected else None,
        created_at=fields.created_at, user=fields.user, domain=fields.domain, kind=fields.kind,
    )  # fmt: skip


def _format_of(row: Mapping[str, Any]) -> str:
    if "messages" in row or str(row.get("text", "")).lstrip().startswith(_CHATML):
        return "messages"
    if "conversations" in row or "conversation" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    if "prompt" in row:
        return "prompt_completion"
    found = f"the fields {short_repr(', '.join(map(str, row)))}" if row else "no fields"
    raise ValueError(
        f"found {found}, expected those of one format: instruction and output (alpaca), prompt and completion, "
        "conversations (sharegpt), messages, or event; rename the fields or columns to prompt and completion"
    )


def _conversation(row: Mapping[str, Any], form: str) -> _Conversation:
    """Return the conversation of a row in one of the formats at the top of this module."""
    if form == "sharegpt":
        name = "conversation" if "conversation" in row else "conversations"
        return _split([*map(_Message, _system(row)), *_messages(_field(row, name), name)])
    if form == "messages":
        name = "messages" if "messages" in row else "text"
        value = _field(row, name)
        if not isinstance(value, str):
            return _split(_messages(value, name))
        outside = _CHATML_TURN.sub("", value).strip()
        if outside or _CHATML not in value:
            raise ValueError(f"found {short_repr(outside or value)} outside of the turns, expected {_CHATML}role ...")
        written = _CHATML_TURN.findall(value)
        if reason := unsupported_part({"messages": [{"role": role} for role, _ in written]}):
            raise ExcludedRowError(reason)
        turns = [_turn(role, content, "text") for role, content in written]
        if turns and not turns[-1].content.strip():  # a generation prompt
            turns.pop()
        return _split([*map(_Message, turns)])
    if form == "alpaca":
        prompt: Any = alpaca_prompt(_field(row, "instruction"), row.get("input"), row.get("system"))
        answer = _field(row, "output")
    else:
        found = [name for name in _ANSWER_FIELDS if name in row]
        if len(found) != 1:
            raise ValueError(f"found {', '.join(found) or 'no answer'}, expected one of {', '.join(_ANSWER_FIELDS)}")
        prompt, answer = _field(row, "prompt"), row[found[0]]
        if isinstance(prompt, list) and isinstance(answer, list):
            before = [message._replace(context="it is in the prompt") for message in _messages(prompt, "prompt")]
            return _split([*before, *_messages(answer, found[0])])
    history = row.get("history")  # messages, or [prompt, answer] pairs
    no_history = history is None or history == ""
    turns = [] if no_history else [message.turn for message in _messages(history_messages(history), "history")]
    return _Conversation([*_system(row), *turns], prompt, answer)


def _as_text(answer: Any) -> Any:
    """Return an answer that is a JSON object as its text; any other unchanged.

    Raises:
        ValueError: it is a list, which may be messages or several possible answers, too.
    """
    if isinstance(answer, list):
        raise ValueError("answer: found a list, expected a text or an object; write a JSON list as a text")
    return json.dumps(answer, ensure_ascii=False) if isinstance(answer, Mapping) else answer


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"{name}: is missing")
    return row[name]


def _system(row: Mapping[str, Any]) -> list[Turn]:
    given = row.get("system")
    return [] if given is None or given == "" else [_turn("system", given, "system")]


def _messages(value: Any, name: str) -> list[_Message]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: found {kind_of(value)}, expected a list of turns")
    messages = []
    for number, turn in enumerate(value, start=1):
        where = f"{name}, turn {number}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where}: found {kind_of(turn)}, expected an object")
        role, content = ("from", "value") if "from" in turn else ("role", "content")
        text = turn.get(content)
        if isinstance(text, list):
            text = "".join(_part_text(part, where) for part in text)
        said = _turn(turn.get(role), text, where)
        messages.append(_Message(said, loss_mask_field(turn) if said.role == "assistant" else ""))
    return messages


def _part_text(part: Any, where: str) -> str:
    """Return the text of a content part."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        found = f"a part of the type {short_repr(kind)}" if kind not in {None, "text"} else "a part without text"
        raise ValueError(f"{where}: found {found}, expected parts of the type 'text' with a text")
    return str(part["text"])


def _turn(role: Any, content: Any, where: str) -> Turn:
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"{where}: the role is {short_repr(role)}, expected system, user (human) or assistant (gpt)")
    if not isinstance(content, str):
        raise ValueError(f"{where}: found {kind_of(content)}, expected a text")
    try:
        return Turn.model_validate({"role": known, "content": content})
    except ValidationError as error:
        raise ValueError(f"{where}: {error_message(error)}") from None


def _split(messages: Sequence[_Message]) -> _Conversation:
    """Return the last answer to train on with its prompt and history. The turns after it are dropped."""
    answers = [number for number, message in enumerate(messages) if message.turn.role == "assistant"]
    if not answers:
        raise ValueError("there is no turn of the assistant, so there is no answer")
    last = next((number for number in reversed(answers) if not messages[number].context), None)
    excluded = messages[answers[-1]].context
    if last is None:
        raise ExcludedRowError(f"every answer is excluded from training ({excluded})")
    turns = [message.turn for message in messages]
    if last == 0 or turns[last - 1].role != "user":
        raise ValueError("no turn of the user precedes the last answer")
    return _Conversation(turns[: last - 1], turns[last - 1].content, turns[last].content, excluded)
