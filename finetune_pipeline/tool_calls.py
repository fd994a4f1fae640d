"""Recognize conversations with tool calls, media or refusals, which the project cannot train on or record yet."""

import re
from collections.abc import Mapping
from typing import Any

_TOOL_FIELDS = frozenset(
    {
        "toolcall", "toolcalls", "invalidtoolcalls", "tooluse", "tooluses", "toolresult", "toolresults",
        "toolinvocation", "toolinvocations", "toolresponse", "toolresponses", "toolplan", "tools", "availabletools",
        "functioncall", "functioncalls", "functionresponse", "functionresponses", "functions", "availablefunctions",
    }
)  # fmt: skip
_MEDIA_FIELDS = frozenset({"audio", "audios", "image", "images", "video", "videos"})
_ATTACHMENTS = frozenset({"files", "attachments", "experimentalattachments"})  # of a turn; a row may list its files
_ROLES = frozenset({"observation", "ipython"})
_TURN_FIELDS = ("messages", "conversations", "conversation", "history", "prompt", "completion", "response", "output")
_NESTED = ("additional_kwargs", "additionalKwargs")  # of a turn in LangChain's exports: its other fields
_ABSENT = frozenset({"", "[]", "{}", "null", "none", "nan", "false", "no", "0"})
_ABSENT_REFUSALS = frozenset({"", "null"})  # "No" is a refusal
_NO_TOOLS = "tool calls are not supported yet"
_ONLY_TEXT = "only text is supported"


def unsupported_part(row: Mapping[str, Any]) -> str:
    """Return which part of a conversation an example cannot have; empty if there is none.

    Tool calls, their results and the definitions of tools are such parts, and so are images, audio and files, and
    refusals, which stand beside an empty answer. They are found in the row itself and in its turns, by the names that
    OpenAI, Anthropic, Cohere, Google, LangChain, Vercel's AI SDK and the ShareGPT exports of trainers give them, in any
    case and with or without underscores. An example without them would teach another answer.

    Args:
        row: a row or event. Empty values count as absent, also as text (`[]` in a cell of CSV).
    """
    found = _unsupported_field(row, _MEDIA_FIELDS)
    for name in _TURN_FIELDS:
        turns = row.get(name)
        for turn in turns if isinstance(turns, list | tuple) else ():
            if not found and isinstance(turn, Mapping):
                found = _unsupported_in_turn(turn)
    return found


def _unsupported_in_turn(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("from", turn.get("role"))).strip()
    if _is_of_tools(role) or _fold(role) in _ROLES:
        return f"has a turn of the role {role!r}; {_NO_TOOLS}"
    contents = (turn.get(name) for name in ("content", "value", "parts"))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    for part in (turn, *(turn.get(name) for name in _NESTED), *parts):
        if isinstance(part, Mapping):
            if _is_of_tools(str(part.get("type"))):
                return f"has a content part of the type {part['type']}; {_NO_TOOLS}"
            if found := _unsupported_field(part, _MEDIA_FIELDS | _ATTACHMENTS):
                return found
    return ""


def _unsupported_field(fields: Mapping[str, Any], media: frozenset[str]) -> str:
    for name, value in fields.items():
        folded = _fold(name)
        if folded == "refusal" and not _is_absent(value, _ABSENT_REFUSALS):
            return "has a refusal instead of an answer"
        if folded in _TOOL_FIELDS | media and not _is_absent(value, _ABSENT):
            return f"has {name}; {_NO_TOOLS if folded in _TOOL_FIELDS else _ONLY_TEXT}"
    return ""


def _is_absent(value: Any, texts: frozenset[str]) -> bool:
    return value.strip().casefold() in texts if isinstance(value, str) else not value


def _is_of_tools(name: str) -> bool:
    """Return whether a role or type is of tools, such as `tool-result`, `server_tool_use` or `functionResponse`."""
    return "tool" in name.casefold() or "function" in name.casefold()


def _fold(name: Any) -> str:
    return re.sub(r"[_\W]+", "", str(name)).casefold()
