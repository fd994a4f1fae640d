"""Answers of the base with its adapter, unmerged, in transformers: the reference for every exported model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.records import Message

_BATCH = 8


@dataclass(frozen=True)
class Questions:
    """Conversations to answer greedily, each in at most `max_tokens` tokens."""

    chats: Sequence[list[Message]]
    max_tokens: int

    def write(self, path: Path) -> None:
        """Write them for the process that answers."""
        path.write_text(json.dumps({"chats": list(self.chats), "max_tokens": self.max_tokens}), encoding="utf-8")


def answer(model: Any, base_folder: Path, questions: Path, answers: Path) -> None:
    """Answer the questions of a file with a model, and write the list of answers.

    Args:
        model: a causal language model of transformers, with or without an adapter in its layers.
        base_folder: the base model, for its tokenizer.
        questions: file written by `Questions.write`.
        answers: the file to write.
    """
    from transformers import AutoTokenizer, GenerationConfig

    asked = json.loads(questions.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=False)
    template = tokenizer_chat_template(tokenizer)  # as in service: a control token in a message is text
    prompts = [template.tokens(chat) for chat in asked["chats"]]
    ends = _ends(model, tokenizer)
    own = model.generation_config
    # Not the model's own configuration, which may have penalties: the engine decodes without them.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=asked["max_tokens"], eos_token_id=sorted(ends), pad_token_id=min(ends)
    )
    try:
        batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
        ids = [said for batch in batches for said in _generate(model, batch, min(ends))]
    finally:
        model.generation_config = own
    texts = [tokenizer.decode(_until(said, ends), skip_special_tokens=True) for said in ids]
    answers.write_text(json.dumps(texts), encoding="utf-8")


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: all special ones, since engines differ in which of them they stop at."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*listed, *special, *tokenizer.all_special_ids}


def _generate(model: Any, prompts: Sequence[list[int]], pad: int) -> list[list[int]]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        said = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    answers: list[list[int]] = said[:, longest:].tolist()
    return answers


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Return the tokens before the first one that ends the answer."""
    last = next((place for place, id in enumerate(ids) if id in ends), len(ids))
    return list(ids[:last])
