"""Render a chat template the way transformers does, and tokenize the result so that text from people stays text.

A message that contains `<|im_end|>` must not end its turn. The template is rendered twice, the second time with
stand-ins for the characters that control tokens begin and end with, everywhere in the messages. Both texts have the
same length, so a control token that is only in the first comes from a message, or is completed by one. The text is
split inside that token before it is tokenized, so no tokenizer finds it. Training (transformers) and service
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

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[list[str]], list[list[int]]]
"""Returns the tokens of each text; parses control tokens in it, and adds nothing."""

_READING_METHODS = {
    "count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rpartition", "rsplit", "rstrip", "split", "startswith", "strip",
}  # fmt: skip
_STAND_INS = 0x10F000  # private-use characters of the last plane
# As in llama.cpp's converter, which makes these control tokens even if the tokenizer does not mark them as special.
_LOOKS_LIKE_CONTROL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused\d+>", re.DOTALL)


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        pieces: the text, split inside each control token that a message contains or completes.
        own: the control tokens that the template wrote; known only if a message might contain one.
    """

    pieces: tuple[str, ...]
    own: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The complete text."""
        return "".join(self.pieces)

    @property
    def escaped(self) -> bool:
        """Whether a message contains or completes a control token."""
        return len(self.pieces) > 1


class ChatTemplate:
    """A compiled chat template and the tokenizer that its text is for.

    It runs in jinja's sandbox: it comes with a model file and is not trusted.

    Args:
        source: the template.
        variables: what the template can use in addition to the messages, such as bos_token.
        special: text and id of each special token.
        added: text and id of the other tokens that a tokenizer matches before it splits a text; those that the
            template writes are control tokens too.
        tokenize: the model's tokenizer.

    Raises:
        RequestRefused: it is not a valid template.
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
            reading = _with_marked_comparisons(environment.parse(source), self._control)
            self._marked_template = environment.from_string(reading)
        except Exception as error:
            raise RequestRefused(
                f"the model's chat template is not valid jinja: {error}. Ask with a plain `prompt`, or correct "
                "chat_template.jinja beside the model's tokenizer and convert it again"
            ) from error

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> RenderedChat:
        """Return the text of the messages, by default with the generation prompt.

        Raises:
            RequestRefused: the template rejects these messages (roles in another order, for instance), or acts on a
                control token in one of them in a way that cannot be reproduced.
        """
        text = self._render(self._template, messages, add_generation_prompt)
        held = list(_strings(messages))
        if not any(map(self._control.may_begin_or_end_in, held)):
            return RenderedChat((text,))
        marked = self._render(self._marked_template, self._control.mark(messages), add_generation_prompt)
        own = self._control.separate(marked)
        if self._control.mark(text) != self._control.mark(marked):
            # The template computes with the characters that were replaced. This does not matter if no message contains
            # a control token, and the template assembled none from several messages.
            if any(any(self._control.everywhere(one)) for one in held) or len(own) != len(self._control.separate(text)):
                raise RequestRefused(
                    "a message contains a control token of the model, and the chat template acts on it, so it cannot "
                    "be tokenized as text; remove it from the message"
                )
            return RenderedChat((text,))
        cuts = self._control.cuts(text, marked, own)
        pieces = tuple(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return RenderedChat(pieces, tuple(self._control.ids[marked[start:end]] for start, end in own))

    def tokens(self, messages: list[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the tokens of the rendered messages; control tokens among them are the template's own.

        Raises:
            RequestRefused: as `render` does, or the tokenizer finds control tokens in a message.
        """
        return self.encode([self.render(messages, add_generation_prompt=add_generation_prompt)])[0]

    def encode(self, conversations: Sequence[RenderedChat]) -> list[list[int]]:
        """Return the tokens of each rendered conversation.

        Raises:
            RequestRefused: the tokenizer finds control tokens in a message.
        """
        # A tokenizer may prepend a space to a text. It does not after a line break, whose tokens are removed again.
        texts = [[one.pieces[0], *(f"\n{piece}" for piece in one.pieces[1:])] for one in conversations]
        encoded = iter(self._tokenize(["\n", *chain.from_iterable(texts)]))
        lead = next(encoded)
        return [self._joined(one, [next(encoded) for _ in one.pieces], lead) for one in conversations]

    def _joined(self, rendered: RenderedChat, encoded: list[list[int]], lead: list[int]) -> list[int]:
        tokens = encoded[0]
        if len(encoded) == 1:
            return tokens
        for piece, found in zip(rendered.pieces[1:], encoded[1:], strict=True):
            stands_alone = found[: len(lead)] == lead
            tokens = tokens + (found[len(lead) :] if stands_alone else self._tokenize([piece])[0])
        if tuple(token for token in tokens if token in self._control.numbers) != rendered.own:
            raise RequestRefused(
                "a message contains a control token of the model that its tokenizer cannot read as text; remove it "
                "from the message"
            )
        return tokens

    def _render(self, template: "jinja2.Template", messages: Any, add_generation_prompt: bool) -> str:
        try:
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template can raise anything: it is a program that came with the model
            raise RequestRefused(
                f"the model's chat template cannot render these {len(messages)} messages: {error}. Give them the roles "
                "and the order that the template expects, usually system, user, assistant, user"
            ) from error


def tokenizer_chat_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """Return the chat template of a transformers tokenizer, as training reads it.

    Raises:
        RequestRefused: the tokenizer has no chat template, or an invalid one.
    """
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise RequestRefused(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; put chat_template.jinja beside it"
        ) from error
    tokens = tokenizer.added_tokens_decoder.items()
    special = {token.content: id for id, token in tokens if token.special or id in tokenizer.all_special_ids}
    added = {token.content: id for id, token in tokens if token.content not in special}

    def tokenize(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    return ChatTemplate(source, tokenizer.special_tokens_map, special, added, tokenize)


class _ControlTokens:
    """The texts of the control tokens; finds and replaces them in a text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: id for text, id in ids.items() if len(text) > 1}  # a single character cannot be split
        self.numbers = frozenset(self.ids.values())
        self._lengths = sorted({len(text) for text in self.ids}, reverse=True)
        starts = sorted({re.escape(text[:3]) for text in self.ids})
        self._starts = re.compile(f"(?={'|'.join(starts)})" if starts else r"(?!)")
        ends = sorted(set(chain.from_iterable(_ends(text) for text in self.ids)))
        self._stand_ins = {ord(character): chr(_STAND_INS + number) for number, character in enumerate(ends)}
        self._ends = _one_of(ends)

    def may_begin_or_end_in(self, text: str) -> bool:
        """Return whether a text contains a character that control tokens begin or end with."""
        return bool(self._ends.search(text))

    def mark(self, value: Any) -> Any:
        """Replace the characters that control tokens begin or end with, in a string or in all strings of a value."""
        match value:
            case str():
                return value.translate(self._stand_ins)
            case list() | tuple():
                return [self.mark(one) for one in value]
            case dict():
                return {key: self.mark(one) for key, one in value.items()}
        return value

    def everywhere(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the longest control token at each position where one begins; they may overlap."""
        for start in (match.start() for match in self._starts.finditer(text)):
            for length in self._lengths:
                if text[start : start + length] in self.ids:
                    yield start, start + length
                    break

    def separate(self, text: str) -> list[tuple[int, int]]:
        """Return the control tokens of a text as tokenizers find them: from the left, the longest first."""
        spans: list[tuple[int, int]] = []
        for start, end in self.everywhere(text):
            if not spans or start >= spans[-1][1]:
                spans.append((start, end))
        return spans

    def cuts(self, text: str, marked: str, own: Sequence[tuple[int, int]]) -> list[int]:
        """Return where to split a text, so that only the template's own control tokens are left in it.

        Args:
            text: as it was rendered.
            marked: the same with the messages marked.
            own: the control tokens of `marked`.
        """
        within = {place for start, end in own for place in range(start + 1, end)}
        places = set()
        for start, end in self.everywhere(text):
            if text[start:end] != marked[start:end]:
                places.add(next((place for place in range(start + 1, end) if place not in within), start + 1))
        return sorted(places)


def _ends(token: str) -> set[str]:
    """Return the first and last character of a token, but no letters and digits if one of them is another character.

    Strings that a template compares, such as roles, consist of letters and should not be marked.
    """
    ends = {token[0], token[-1]}
    return {one for one in ends if not one.isalnum() and not one.isspace()} or ends


def _one_of(characters: "Sequence[str] | set[str]") -> re.Pattern[str]:
    return re.compile(f"[{re.escape(''.join(sorted(characters)))}]" if characters else r"(?!)")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _with_marked_comparisons(template: "jinja2.nodes.Template", control: _ControlTokens) -> "jinja2.nodes.Template":
    """Mark the constants that a template searches for in messages, so that it finds them in marked messages too."""
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
        """`{% generation %}` marks what is trained on; for the text it means nothing."""

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
