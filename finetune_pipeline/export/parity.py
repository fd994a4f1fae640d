"""Same tokens, same answers: what the asset checks of a GGUF ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.records import Message


@dataclass(frozen=True)
class TokenDifference:
    """One conversation that the GGUF reads otherwise than the model was trained to."""

    text: str
    expected: list[int]
    found: list[int]


@dataclass(frozen=True)
class ParityResult:
    """Whether training and service read the same tokens, and the conversations that they do not."""

    checked: int
    offenders: tuple[TokenDifference, ...]

    @property
    def same(self) -> bool:
        """Whether no conversation differs."""
        return not self.offenders


@dataclass(frozen=True)
class Agreement:
    """On how many prompts two models gave the same answer, and the positions of the others."""

    same: int
    total: int
    offenders: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of same answers, 1.0 when there were none."""
        return self.same / self.total if self.total else 1.0


def tokenizer_parity(base_folder: Path, engine: Engine, samples: Sequence[list[Message]]) -> ParityResult:
    """Compare the tokens of conversations in transformers (training) and llama.cpp (service).

    Each is also compared with control tokens in its last message, which both have to tokenize as text.

    Args:
        base_folder: the base model, whose tokenizer trained.
        engine: the GGUF that would serve.
        samples: conversations that end with the user's message.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=False)
    template = tokenizer_chat_template(tokenizer)
    forged = "".join(dict.fromkeys(token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token))
    offenders = []
    for messages in samples:
        *before, last = messages
        injected = [*before, {**last, "content": f"{last['content']}{forged}\n{forged}"}]
        expected = template.tokens(messages)
        if not template.render(messages).escaped:
            expected = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for asked, tokens in ((messages, expected), (injected, template.tokens(injected))):
            found = engine.encode(asked)
            if tokens != found:
                offenders.append(TokenDifference(engine.render(asked), tokens, found))
    return ParityResult(len(samples), tuple(offenders))


def agreement(answers_a: Sequence[str], answers_b: Sequence[str]) -> Agreement:
    """Compare two models' answers to the same prompts, without white space around them.

    >>> agreement(["a", "b "], ["a", "b"]).same
    2
    """
    pairs = zip(answers_a, answers_b, strict=True)
    offenders = tuple(place for place, (a, b) in enumerate(pairs) if a.strip() != b.strip())
    return Agreement(len(answers_a) - len(offenders), len(answers_a), offenders)
