"""What a row teaches, in the forms in which conversations are published. A form is told by the row's fields:

    {"instruction", "input", "output"[, "system", "history"]}           alpaca
    {"prompt", "completion" or "response" or "output"[, "history"]}     prompt_completion; both may be lists of messages
    {"conversations": [{"from", "value"}, ...][, "system"]}             sharegpt
    {"messages": [{"role", "content"}, ...]}                            messages, as OpenAI's API has them
    {"text": "<|im_start|>user\\n...<|im_end|>..."}                      messages, as one text in ChatML

Each may have a `reward` (-1 to 1), a `correction` (what the answer should have been), `user`, `domain`, `kind` and
`created_at` in addition; other fields are not looked at. The last turn of the assistant is the answer, the turn before
it the prompt, all before them the history.

In a turn, `weight: 0`, or `train`, `trainable` or `loss` of false, makes its answer context only: the last answer
without it is the target. In a row, it excludes the row from training.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from finetune_pipeline.records import PastUtcDatetime, ShortText, Text, Turn, alpaca_prompt, loss_mask_field
from finetune_pipeline.settings import FileFormat
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.validation_messages import error_message, short_repr

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
_CHATML = "<|im_start|>"
_CHATML_TURN = re.compile(r"<\|im_start\|>([^\n<]*)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ANSWERS = ("completion", "response", "output")


class _Said(NamedTuple):
    """History, prompt and answer of a row, and the field that excludes a later answer from training."""

    history: list[Turn]
    prompt: Any
    answer: Any
    dropped: str = ""


class _Message(NamedTuple):
    """A turn, and the field that makes it context only; empty if it may be the target."""

    turn: Turn
    context: str = ""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


class _Taught(BaseModel):
    """What a row must have when its form is taken off."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, coerce_numbers_to_str=True)

    prompt: Annotated[Text, Field(strict=True), AfterValidator(_not_blank)]
    answer: Annotated[Text, Field(strict=True), AfterValidator(_not_blank)]
    correction: Annotated[Text, Field(strict=True), AfterValidator(_not_blank)] | None = None
    reward: float | None = Field(default=None, ge=-1, le=1)
    user: ShortText | None = None
    domain: ShortText | None = None
    kind: ShortText | None = None
    created_at: PastUtcDatetime | None = None


def to_record(row: Any, provenance: str, form: FileFormat = "auto") -> SourceRecord:
    """The conversation of a row.

    Args:
        provenance: where the row stands.
        form: what the row is; auto tells by its fields.

    Raises:
        ValueError: it is of no known form, something in it is missing, empty or of the wrong type, or it has no answer
            that is to be trained on.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"found {type(row).__name__}, expected an object with named fields")
    said = _FORMS[_form_of(row) if form == "auto" else form](row)
    if marked := loss_mask_field(row):
        raise ValueError(f"the row is not to be trained on ({marked})")
    try:
        taught = _Taught.model_validate({**row, "prompt": said.prompt, "answer": said.answer})
    except ValidationError as error:
        raise ValueError(error_message(error)) from None
    corrected = taught.correction is not None
    if corrected and said.dropped:
        raise ValueError(f"correction: it is of the last answer, which is not to be trained on ({said.dropped})")
    return SourceRecord(
        provenance, taught.prompt, taught.correction or taught.answer, tuple(said.history),
        reward=None if corrected else taught.reward,  # it was of the answer that was corrected
        model_output=taught.answer if corrected else None,
        created_at=taught.created_at, user=taught.user, domain=taught.domain, kind=taught.kind,
    )  # fmt: skip


def _form_of(row: Mapping[str, Any]) -> str:
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
        f"found {found}, expected those of one form: instruction and output (alpaca), prompt and completion, "
        "conversations (sharegpt), messages, or event"
    )


def _alpaca(row: Mapping[str, Any]) -> _Said:
    system = _system(row)
    instruction, asked = _field(row, "instruction"), row.get("input")
    # Where the system prompt stands as the instruction too, what was asked is the input alone.
    prompt = asked if asked and system and instruction == system[0].content else alpaca_prompt(instruction, asked)
    return _Said([*system, *_earlier(row.get("history"))], prompt, _field(row, "output"))


def _prompt_completion(row: Mapping[str, Any]) -> _Said:
    there = [name for name in _ANSWERS if name in row]
    if len(there) != 1:
        raise ValueError(f"found {', '.join(there) or 'no answer'}, expected one of {', '.join(_ANSWERS)}")
    prompt, answer = _field(row, "prompt"), row[there[0]]
    if isinstance(prompt, list) and isinstance(answer, list):
        asked = [message._replace(context="it stands in prompt") for message in _messages_of(prompt, "prompt")]
        return _answered([*asked, *_messages_of(answer, there[0])])
    return _Said([*_system(row), *_earlier(row.get("history"))], prompt, answer)


def _sharegpt(row: Mapping[str, Any]) -> _Said:
    name = "conversation" if "conversation" in row else "conversations"
    return _answered([*map(_Message, _system(row)), *_messages_of(_field(row, name), name)])


def _messages(row: Mapping[str, Any]) -> _Said:
    name = "messages" if "messages" in row else "text"
    value = _field(row, name)
    return _answered(_chatml(value) if isinstance(value, str) else _messages_of(value, name))


_FORMS: dict[str, Callable[[Mapping[str, Any]], _Said]] = {
    "alpaca": _alpaca, "prompt_completion": _prompt_completion, "sharegpt": _sharegpt, "messages": _messages
}  # fmt: skip


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"{name}: is missing")
    return row[name]


def _system(row: Mapping[str, Any]) -> list[Turn]:
    given = row.get("system")
    return [_turn("system", given, "system")] if given else []


def _earlier(value: Any) -> list[Turn]:
    """The history of a flat row: messages, or pairs of what was asked and what was answered."""
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        sides = [(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]
        return [_turn(role, text, "history") for role, text in sides if text]
    return [message.turn for message in _messages_of(value, "history")]


def _messages_of(value: Any, name: str) -> list[_Message]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: found {type(value).__name__}, expected a list of turns")
    messages = []
    for number, turn in enumerate(value, start=1):
        where = f"{name}, turn {number}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where}: found {type(turn).__name__}, expected an object")
        role, content = ("from", "value") if "from" in turn else ("role", "content")
        said = _turn(turn.get(role), _parts(turn.get(content)), where)
        messages.append(_Message(said, loss_mask_field(turn) if said.role == "assistant" else ""))
    return messages


def _turn(role: Any, content: Any, where: str) -> Turn:
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"{where}: the role is {short_repr(role)}, expected system, user (human) or assistant (gpt)")
    if not isinstance(content, str):
        raise ValueError(f"{where}: found {type(content).__name__}, expected a text")
    try:
        return Turn.model_validate({"role": known, "content": content})
    except ValidationError as error:
        raise ValueError(f"{where}: {error_message(error)}") from None


def _parts(content: Any) -> Any:
    """The text of a message that is given in parts; anything but texts in it is left as it is, to be refused."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _chatml(text: str) -> list[_Message]:
    beside = _CHATML_TURN.sub("", text).strip()
    if beside or _CHATML not in text:
        raise ValueError(f"found {short_repr(beside or text)} outside of the turns, expected {_CHATML}role ...")
    messages = [_Message(_turn(role, content, "text")) for role, content in _CHATML_TURN.findall(text)]
    open_turn = messages and not messages[-1].turn.content.strip()  # for a model to go on
    return messages[:-1] if open_turn else messages


def _answered(messages: Sequence[_Message]) -> _Said:
    """Return the last answer to train on, with its prompt and history; the turns after it are dropped."""
    answers = [number for number, message in enumerate(messages) if message.turn.role == "assistant"]
    if not answers:
        raise ValueError("no turn is the assistant's, so there is no answer")
    last = next((number for number in reversed(answers) if not messages[number].context), None)
    dropped = messages[answers[-1]].context
    if last is None:
        raise ValueError(f"no answer is to be trained on ({dropped})")
    turns = [message.turn for message in messages]
    if last == 0 or turns[last - 1].role != "user":
        raise ValueError("no turn of the user stands before the last answer")
    return _Said(turns[: last - 1], turns[last - 1].content, turns[last].content, dropped)
