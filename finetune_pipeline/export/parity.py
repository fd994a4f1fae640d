"""Parity of a GGUF with the trained model: the same tokens, and the same answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.records import Message


@dataclass(frozen=True)
class TokenDifference:
    """A conversation that the GGUF tokenizes differently from training."""

    text: str
    expected: list[int]
    found: list[int]


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


def tokenizer_parity(base_folder: Path, engine: Engine, samples: Sequence[list[Message]]) -> list[TokenDifference]:
    """Return the conversations with different tokens in transformers (training) and llama.cpp (service).

    Each conversation is also compared with control tokens in its last message, which both have to tokenize as text.

    Args:
        base_folder: the base model, whose tokenizer training used.
        engine: the GGUF that would serve.
        samples: conversations that end with a user message.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=False)
    template = tokenizer_chat_template(tokenizer)
    control = "".join(dict.fromkeys(token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token))
    offenders = []
    for messages in samples:
        *before, last = messages
        injected = [*before, {**last, "content": f"{last['content']}{control}\n{control}"}]
        expected = template.tokens(messages)
        if not template.render(messages).escaped:
            expected = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for conversation, tokens in ((messages, expected), (injected, template.tokens(injected))):
            found = engine.encode(conversation)
            if tokens != found:
                offenders.append(TokenDifference(engine.render(conversation), tokens, found))
    return offenders


def compare_answers(answers_a: Sequence[str], answers_b: Sequence[str]) -> Agreement:
    """Compare two models' answers to the same prompts, ignoring leading and trailing white space.

    >>> compare_answers(["a", "b "], ["a", "b"]).same
    2
    """
    pairs = zip(answers_a, answers_b, strict=True)
    offenders = tuple(index for index, (a, b) in enumerate(pairs) if a.strip() != b.strip())
    return Agreement(len(answers_a) - len(offenders), len(answers_a), offenders)
