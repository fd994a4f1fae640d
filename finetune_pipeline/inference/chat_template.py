"""Render chat templates as transformers does, and tokenize the result without control tokens from messages.

A message that contains `<|im_end|>` must not end its turn. The template is rendered twice. The second time, all
characters in messages that control tokens begin or end with are replaced by placeholders. Both texts have the same
length, so a control token that is only in the first text comes from a message, or is completed by one. The text is
split inside that token before it is tokenized, so that no tokenizer finds it. Training (transformers) and serving
(llama.cpp) both use this module, so they get the same tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Message
from finetune_pipeline.validation_messages import short_repr

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[list[str]], list[list[int]]]
"""A function that returns the tokens of each text. It parses control tokens and adds nothing."""

NO_REASONING = {"enable_thinking": False, "thinking": False}
"""Variables by which the templates of reasoning models (Qwen 3, Nemotron 3, SmolLM3, ...) write an empty thought at the
end of the prompt. Examples have no thoughts, so the model answers at once, in training as in service."""

_READING_METHODS = {
    "count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rpartition", "rsplit", "rstrip", "split", "startswith", "strip",
}  # fmt: skip
_ANSWER = "answer"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_PLACEHOLDERS = 0x10F000  # first of the private-use characters of the last Unicode plane
# As in llama.cpp's converter, which makes them control tokens even if the tokenizer does not mark them as special.
_LOOKS_LIKE_CONTROL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused\d+>", re.DOTALL)


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        segments: the text, split inside each control token that a message contains or completes.
        template_tokens: the control tokens that the template wrote; known only if a message might contain one.
    """

    segments: tuple[str, ...]
    template_tokens: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The complete text."""
        return "".join(self.segments)

    @property
    def escaped(self) -> bool:
        """Return whether a message contains or completes a control token."""
        return len(self.segments) > 1


class ChatTemplate:
    """A compiled chat template and the tokenizer for its text.

    The template runs in jinja's sandbox, because it comes with a model file and is not trusted.

    Args:
        source: the template.
        variables: variables of the template in addition to the messages, such as bos_token.
        special: text and id of each special token.
        added: text and id of the other tokens that a tokenizer matches before it splits a text; those that occur in
            the template are control tokens too.
        tokenize: the model's tokenizer.

    Raises:
        RequestRefused: the template is not valid.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        special: Mapping[str, int],
        added: Mapping[str, int],
        tokenize: Tokenize,
    ) -> None:
        written = {text: id for text, id in added.items() if text in source or _LOOKS_LIKE_CONTROL.fullmatch(text)}
        self._control = _ControlTokens({**special, **written})
        self._variables = variables
        self._tokenize = tokenize
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            marked = _mark_comparisons(environment.parse(source), self._control)
            self._marked_template = environment.from_string(marked)
        except Exception as error:
            raise RequestRefused(
                f"The model's chat template is not valid jinja: {error}. Send a plain `prompt`, or correct "
                "chat_template.jinja beside the model's tokenizer and convert the model again."
            ) from error

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Return the text of the messages, by default with the generation prompt.

        Args:
            prefill: beginning of the answer, which follows the generation prompt.
            variables: further variables of the template, such as `enable_thinking`.

        Raises:
            RequestRefused: the template rejects these messages (because of their roles, for instance), or processes a
                control token in one of them in a way that cannot be reproduced.
        """
        control = self._control
        given = dict(variables or {})
        reserved = given.keys() & {*_RESERVED, *self._variables}
        if reserved:
            raise RequestRefused(
                f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}, which the request and the model "
                "determine. Leave it out."
            )
        text = self._render(self._template, messages, add_generation_prompt, given) + prefill
        strings = list(_strings([*messages, prefill, given]))
        if not any(map(control.may_begin_or_end_in, strings)):
            return RenderedChat((text,))
        marked_messages, marked_variables = control.mark(messages), control.mark(given)
        marked = self._render(self._marked_template, marked_messages, add_generation_prompt, marked_variables)
        marked += control.mark(prefill)
        of_template = control.find_separate(marked)
        if control.mark(text) != control.mark(marked):
            # The template computes with the characters that were replaced. This does not matter if no message contains
            # a control token, and the template assembled none from several messages.
            in_message = any(any(control.find_all(string)) for string in strings)
            if in_message or len(of_template) != len(control.find_separate(text)):
                raise RequestRefused(
                    "A message contains a control token of the model, and the chat template processes it, so it cannot "
                    "be tokenized as text. Remove it from the message."
                )
            return RenderedChat((text,))
        cuts = control.cuts(text, marked, of_template)
        segments = tuple(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return RenderedChat(segments, tuple(control.ids[marked[start:end]] for start, end in of_template))

    def end_token(self) -> int:
        """Return the control token that the template writes after an answer, at which generation stops.

        Raises:
            RequestRefused: it writes none, or rejects a question with its answer.
        """
        conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.render(conversation, add_generation_prompt=False).text
        except RequestRefused:  # a template may require a system message
            text = self.render(
                [{"role": "system", "content": "system"}, *conversation], add_generation_prompt=False
            ).text
        before, _, after = text.rpartition(_ANSWER)
        written = self._control.find_separate(after) if before else []
        if not written:
            found = f"only {short_repr(after)}" if before and after else "nothing"
            raise RequestRefused(
                f"The model's chat template writes {found} after an answer, and no control token, so a model cannot "
                "learn to end an answer, and generation would stop only at the longest completion. Let the template "
                "write {{ eos_token }} there, or use an instruction-tuned model with its own template."
            )
        return self._control.ids[after[slice(*written[0])]]

    def without_control_tokens(self, text: str) -> str:
        """Return a text as the engine returns it, which writes no control tokens."""
        for start, end in reversed(self._control.find_separate(text)):
            text = text[:start] + text[end:]
        return text

    def tokens(
        self, messages: list[Message], *, prefill: str = "", variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the tokens of the rendered messages with the generation prompt; all control tokens are the template's.

        Raises:
            RequestRefused: as `render` does, or the tokenizer finds control tokens in a message.
        """
        return self.encode([self.render(messages, prefill=prefill, variables=variables)])[0]

    def encode(self, conversations: Sequence[RenderedChat]) -> list[list[int]]:
        """Return the tokens of each rendered conversation.

        Raises:
            RequestRefused: the tokenizer finds control tokens in a message.
        """
        # A tokenizer may prepend a space to a text, but not after a line break. So each later segment is tokenized
        # after a line break, whose tokens are removed again.
        texts = [[chat.segments[0], *(f"\n{segment}" for segment in chat.segments[1:])] for chat in conversations]
        encoded = iter(self._tokenize(["\n", *chain.from_iterable(texts)]))
        line_break = next(encoded)
        result = []
        for chat in conversations:
            tokens = next(encoded)
            for segment in chat.segments[1:]:
                found = next(encoded)
                # A tokenizer may also merge the line break with the segment; then the segment is tokenized alone.
                separable = found[: len(line_break)] == line_break
                tokens = tokens + (found[len(line_break) :] if separable else self._tokenize([segment])[0])
            control = (token for token in tokens if token in self._control.numbers)
            if chat.escaped and tuple(control) != chat.template_tokens:
                raise RequestRefused(
                    "A message contains a control token of the model that its tokenizer cannot read as text. Remove it "
                    "from the message."
                )
            result.append(tokens)
        return result

    def _render(
        self, template: "jinja2.Template", messages: Any, add_generation_prompt: bool, given: dict[str, Any]
    ) -> str:
        try:
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **{**NO_REASONING, **given},  # a request can switch reasoning on
            )
        except Exception as error:  # a template is a program and can raise anything
            raise RequestRefused(
                f"The model's chat template cannot render these {len(messages)} messages: {error}. Use the roles and "
                "the order that the template expects, usually system, user, assistant, user."
            ) from error


def tokenizer_chat_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """Return the chat template of a transformers tokenizer.

    Raises:
        RequestRefused: the tokenizer has no chat template, or an invalid one.
    """
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise RequestRefused(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template; put chat_template.jinja beside it."
        ) from error
    tokens = tokenizer.added_tokens_decoder.items()
    special = {token.content: id for id, token in tokens if token.special or id in tokenizer.all_special_ids}
    added = {token.content: id for id, token in tokens if token.content not in special}

    def tokenize(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    try:
        return ChatTemplate(source, tokenizer.special_tokens_map, special, added, tokenize)
    except RequestRefused as error:
        raise RequestRefused(
            f"The chat template of {tokenizer.name_or_path} is not valid jinja ({error.__cause__}); correct "
            "chat_template.jinja in the folder (or chat_template in tokenizer_config.json), or copy the file from the "
            "original model."
        ) from error


def used_variables(source: str) -> set[str]:
    """Return the variables that a chat template reads without setting them; none of an invalid template."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        return meta.find_undeclared_variables(_environment().parse(source))
    except TemplateSyntaxError:
        return set()


class _ControlTokens:
    """Finds control tokens in texts, and replaces the characters that they begin and end with by placeholders."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: id for text, id in ids.items() if len(text) > 1}  # one character cannot be split
        self.numbers = frozenset(self.ids.values())
        self._lengths = sorted({len(text) for text in self.ids}, reverse=True)
        starts = sorted({re.escape(text[:3]) for text in self.ids})
        self._starts = re.compile(f"(?={'|'.join(starts)})" if starts else r"(?!)")
        ends = sorted(set(chain.from_iterable(_ends(text) for text in self.ids)))
        self._placeholders = {ord(character): chr(_PLACEHOLDERS + number) for number, character in enumerate(ends)}
        self._ends = re.compile(f"[{re.escape(''.join(ends))}]" if ends else r"(?!)")

    def may_begin_or_end_in(self, text: str) -> bool:
        """Return whether a text contains a character that control tokens begin or end with."""
        return bool(self._ends.search(text))

    def mark(self, value: Any) -> Any:
        """Replace the characters that control tokens begin or end with, in a string or in all strings of a value."""
        match value:
            case str():
                return value.translate(self._placeholders)
            case list() | tuple():
                return [self.mark(one) for one in value]
            case dict():
                return {key: self.mark(one) for key, one in value.items()}
        return value

    def find_all(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the longest control token at each position where one begins; they may overlap."""
        for start in (match.start() for match in self._starts.finditer(text)):
            for length in self._lengths:
                if text[start : start + length] in self.ids:
                    yield start, start + length
                    break

    def find_separate(self, text: str) -> list[tuple[int, int]]:
        """Return the control tokens of a text as tokenizers find them: from the left, the longest first."""
        spans: list[tuple[int, int]] = []
        for start, end in self.find_all(text):
            if not spans or start >= spans[-1][1]:
                spans.append((start, end))
        return spans

    def cuts(self, text: str, marked: str, of_template: Sequence[tuple[int, int]]) -> list[int]:
        """Return where to split a text so that only the template's control tokens are left in it.

        Args:
            text: the rendered text.
            marked: the same with the messages marked.
            of_template: start and end of the control tokens in `marked`.
        """
        inside_template_tokens = {index for start, end in of_template for index in range(start + 1, end)}
        cuts = set()
        for start, end in self.find_all(text):
            if text[start:end] != marked[start:end]:
                inside = range(start + 1, end)
                cuts.add(next((index for index in inside if index not in inside_template_tokens), start + 1))
        return sorted(cuts)


def _ends(token: str) -> set[str]:
    """Return the first and last character of a token; without letters and digits, if the other one is neither.

    The strings that a template compares, such as roles, consist of letters and should not be marked.
    """
    ends = {token[0], token[-1]}
    return {character for character in ends if not character.isalnum() and not character.isspace()} or ends


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _mark_comparisons(template: "jinja2.nodes.Template", control: _ControlTokens) -> "jinja2.nodes.Template":
    """Mark the constants that a template looks for in messages, so that it finds them in marked messages too."""
    from jinja2 import nodes

    looked_for: list[Any] = []
    for compare in template.find_all(nodes.Compare):
        looked_for += [compare.expr, *(operand.expr for operand in compare.ops)]
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _READING_METHODS:
            looked_for += call.args[:1] if call.node.attr == "replace" else call.args
    for filtering in template.find_all(nodes.Filter):
        if filtering.name == "replace":
            looked_for += filtering.args[:1]
    for test in template.find_all(nodes.Test):
        looked_for += test.args
    while looked_for:
        node = looked_for.pop()
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            node.value = control.mark(node.value)
        elif isinstance(node, nodes.List | nodes.Tuple):
            looked_for += node.items
    return template


def _environment() -> "jinja2.Environment":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMark(Extension):
        """Parse `{% generation %}`, which marks what is trained on, and ignore it."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMark, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
