"""Make a template in Go's syntax for conversations of the loop's shape: system prompt, earlier turns, user message.

Ollama renders by one if it does not take the model's own jinja template. It is made of what the tokenizer's template
writes between the messages of example conversations, and is right if it renders other examples as the tokenizer does.
"""

import json
from collections.abc import Callable

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Message

Render = Callable[[list[Message]], str]
"""Return the prompt of messages as the tokenizer renders it, with the generation prompt."""

_SYSTEM, _USER, _ANSWER, _LAST = ("Zq1system", "Zq2user", "Zq3answer", "Zq4last")
"""Contents that occur in no template."""


def rendered_examples(render: Render, system_prompt: str) -> list[tuple[list[Message], str]]:
    """Return conversations of the loop's shape as an application sends them, each with the prompt it should become.

    The server adds the system prompt to a conversation that has none, as the gateway does.
    """
    turns: list[Message] = [
        {"role": "user", "content": 'How thick is "the wall"?'},
        {"role": "assistant", "content": "36.5 cm: {{ .Content }} <b>&amp;</b>\nin two layers."},
        {"role": "user", "content": "Und die Tür, 門?\n\nIn mm."},
    ]
    system: Message = {"role": "system", "content": 'Answer in one word.\nUse "mm".'}
    default: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    examples = [(sent, render([*default, *sent])) for sent in (turns[:1], turns)]
    for sent in ([system, turns[0]], [system, *turns]):
        try:
            examples.append((sent, render(sent)))
        except RequestRefused:  # a template may know no system message; then no application can send one
            continue
    return examples


def go_template(render: Render, bos: str = "") -> str:
    """Return a Go template that writes what the tokenizer's template writes between messages.

    Args:
        bos: text of the beginning-of-sequence token, which the template leaves to the server's tokenizer.

    Raises:
        RequestRefused: the tokenizer's template refuses a user message, an answer and another user message, or does
            not write them as they are.
    """
    user: Message = {"role": "user", "content": _USER}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    last: Message = {"role": "user", "content": _LAST}
    text = render([user, answer, last])
    if [text.count(one) for one in (_USER, _ANSWER, _LAST)] != [1, 1, 1]:
        raise RequestRefused(
            "the tokenizer's chat template changes or leaves out messages, so none can be made like it"
        )
    first, rest = text.split(_USER)
    to_answer, rest = rest.split(_ANSWER)
    to_user, end = rest.split(_LAST)
    try:
        before_system, rest = render([{"role": "system", "content": _SYSTEM}, user]).split(_SYSTEM)
        after_system = rest.split(_USER)[0]
    except (RequestRefused, ValueError):  # there is no system message, or it is changed
        before_system, after_system = first, to_user
    first, before_system = first.removeprefix(bos), before_system.removeprefix(bos)
    # Consecutive messages of one role reach the template as one: a user message in second place follows the system's.
    return (
        "{{- range $i, $m := .Messages }}"
        f'{{{{- if eq $m.Role "system" }}}}{_literal(before_system)}'
        f'{{{{- else if eq $m.Role "assistant" }}}}{_literal(to_answer)}'
        f"{{{{- else if eq $i 0 }}}}{_literal(first)}"
        f"{{{{- else if eq $i 1 }}}}{_literal(after_system)}"
        f"{{{{- else }}}}{_literal(to_user)}"
        "{{- end }}{{ $m.Content }}{{- end }}"
        f"{_literal(end)}"
    )


def _literal(text: str) -> str:
    """Return an action that writes a text; JSON's escapes are Go's too, and other characters stay as they are."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
