"""Parity of a GGUF with the trained model: the same tokens, and the same answers."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetune_pipeline.inference.chat_template import NO_REASONING, tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.records import Message, Turn, chat_messages
from finetune_pipeline.validation_messages import short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "the loop's conversations"
CONTROL_TOKENS = "control tokens in content"

_QUESTION, _ANSWER = "How thick is the wall?", "It is 200 mm thick."
_SYSTEM = "Answer briefly."
_TEXTS = {
    "punctuation and white space": (
        'Size: 12.5 m - "wall"\n\n  {"a": [1, 20, 300.5]}\tif x != y: # 100 %',
        "  spaces before, and behind \n\n",
    ),
    "non-Latin text": (
        "Größe: 12,5 m² – naïve «café»",
        "東京の壁は厚い。 Стена толщиной 200 мм",
        "جدار خرساني हिन्दी में दीवार ภาษาไทย",
        "👩‍👩‍👧 🙂 e\u0301 \u200b𝔘𝔫𝔦",
    ),
    "empty content": ("",),
}
_MOST_CONTROL_TOKENS = 8
"""Control tokens that are tried alone; Llama 3 has 256. All of them are tried together."""


@dataclass(frozen=True)
class ParityConversation:
    """A conversation whose tokens are compared, and what it tests."""

    kind: str
    messages: list[Message]


@dataclass(frozen=True)
class TokenDifference:
    """A conversation that the GGUF tokenizes differently from training; no tokens if one of them refuses it."""

    kind: str
    messages: list[Message]
    expected: list[int]
    found: list[int]

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]

    def first_pair(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return the first tokens that differ, with their texts in transformers."""
        pairs = zip_longest(self.expected, self.found)
        index, pair = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
        texts = [
            "nothing" if id is None else f"{id} ({tokenizer.convert_ids_to_tokens(id)!r})"
            for id in pair
        ]  # fmt: skip
        return f"token {index} is {texts[0]} in training and {texts[1]} in llama.cpp, near {short_repr(self.text, 40)}"


@dataclass(frozen=True)
class TokenParity:
    """Result of comparing the tokens of conversations.

    Attributes:
        compared: number of conversations of each kind.
        refused: conversations that both refuse, such as system messages for a template without them.
        differences: the conversations with other tokens.
    """

    compared: dict[str, int]
    refused: int
    differences: tuple[TokenDifference, ...]


@dataclass(frozen=True)
class Agreement:
    """Number of prompts with the same answer from two models, and the indices of the others."""

    same: int
    total: int
    offenders: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """Fraction of same answers; 1.0 if there are none."""
        return self.same / self.total if self.total else 1.0


class Encoder(Protocol):
    """Something that tokenizes conversations as a GGUF does."""

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a conversation, with the generation prompt."""


def tokenizer_parity(
    base_folder: Path, engine: Encoder, system_prompt: str, chats: Sequence[list[Message]] = ()
) -> TokenParity:
    """Compare the tokens of conversations in transformers (training) and llama.cpp (service).

    Args:
        base_folder: the base model, whose tokenizer training used.
        engine: the GGUF that would serve.
        system_prompt: of the loop; empty without one.
        chats: conversations of the loop.
    """
    tokenizer = load_tokenizer(base_folder)
    return compare_tokens(tokenizer, engine.encode, parity_conversations(tokenizer, system_prompt, chats))


def parity_conversations(
    tokenizer: "PreTrainedTokenizerBase", system_prompt: str, chats: Sequence[list[Message]] = ()
) -> list[ParityConversation]:
    """Return conversations that show where a GGUF's tokenizer and chat template differ from those of training.

    With and without a system prompt, of several turns, with empty content, text of other scripts, and control tokens:
    each text as system message, as user message, and in earlier turns.

    Args:
        tokenizer: of the base model; its control tokens are tried as text.
        system_prompt: of the loop; empty without one.
        chats: conversations of the loop; each is also tried with control tokens at the end of its last message.
    """
    system = system_prompt or _SYSTEM
    turns = (Turn(role="user", content=_QUESTION), Turn(role="assistant", content=_ANSWER))
    tokens = [*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())]
    control = [token for token in dict.fromkeys(tokens) if token != tokenizer.unk_token]
    joined = "".join(control)
    hostile = (f"{_QUESTION}{joined}\n{joined}", *(f"a{token}\nb" for token in control[:_MOST_CONTROL_TOKENS]))

    def conversations() -> Iterator[tuple[str, list[Message]]]:
        yield "without a system prompt", chat_messages("", _QUESTION)
        yield "with a system prompt", chat_messages(system, _QUESTION)
        for given in ("", system):
            yield "several turns", chat_messages(given, "And the door?", turns)
            yield "several turns", chat_messages(given, "And the door?", turns * 3)
        for kind, texts in {**_TEXTS, CONTROL_TOKENS: hostile if control else ()}.items():
            for text in texts:
                yield kind, _chat(("user", text))
                yield kind, _chat(("system", text), ("user", _QUESTION))
                yield kind, _chat(("user", text), ("assistant", text), ("user", _QUESTION))
        for chat in chats:
            yield OWN, chat
            *before, last = chat
            if control:
                yield CONTROL_TOKENS, [*before, {**last, "content": f"{last['content']}{joined}\n{joined}"}]

    return [ParityConversation(kind, messages) for kind, messages in conversations()]


def compare_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    encode: Callable[[list[Message]], list[int]],
    conversations: Sequence[ParityConversation],
) -> TokenParity:
    """Compare the tokens of transformers and of `encode`.

    A conversation that only one of them refuses is different, too. Where content has control tokens, transformers would
    parse them; training and service both have to tokenize them as text instead.
    """
    template = tokenizer_chat_template(tokenizer)

    def trained(messages: list[Message]) -> list[int]:
        if template.render(messages).escaped:
            return template.tokens(messages)
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **NO_REASONING)
        )

    compared: Counter[str] = Counter()
    refused, differences = 0, []
    for conversation in conversations:
        expected, found = (_or_refused(way, conversation.messages) for way in (trained, encode))
        if expected is None and found is None:
            refused += 1
            continue
        compared[conversation.kind] += 1
        if expected != found:
            differences.append(TokenDifference(conversation.kind, conversation.messages, expected or [], found or []))
    return TokenParity(dict(compared), refused, tuple(differences))


def _chat(*messages: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in messages]


def _or_refused(encode: Callable[[list[Message]], list[int]], messages: list[Message]) -> list[int] | None:
    """Return the tokens of a conversation, or None if the chat template refuses it."""
    from jinja2 import TemplateError

    try:
        return encode(messages)
    except (RequestRefused, TemplateError):  # the second one is from transformers
        return None


def compare_answers(answers_a: Sequence[str], answers_b: Sequence[str]) -> Agreement:
    """Compare two models' answers to the same prompts, ignoring leading and trailing white space.

    >>> compare_answers(["a", "b "], ["a", "b"]).same
    2
    """
    pairs = zip(answers_a, answers_b, strict=True)
    offenders = tuple(index for index, (a, b) in enumerate(pairs) if a.strip() != b.strip())
    return Agreement(len(answers_a) - len(offenders), len(answers_a), offenders)
