"""Answers of the base with its unmerged adapter, in transformers: the reference for every exported model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.export.special_tokens import read_special_tokens
from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.records import Message

_BATCH = 32


@dataclass(frozen=True)
class ReferencePrompts:
    """Conversations to answer greedily, each with at most `max_tokens` tokens."""

    chats: Sequence[list[Message]]
    max_tokens: int

    def write(self, path: Path) -> None:
        """Write them for the child process."""
        path.write_text(json.dumps({"chats": list(self.chats), "max_tokens": self.max_tokens}), encoding="utf-8")


def generate_answers(model: Any, base_folder: Path, prompts_file: Path, answers_file: Path) -> None:
    """Generate the answers to the prompts in a file, and write them as a JSON list.

    Args:
        model: a causal language model of transformers, with or without an adapter in its layers.
        base_folder: the base model, for its tokenizer.
        prompts_file: file written by `ReferencePrompts.write`.
        answers_file: the file to write.
    """
    import torch
    from transformers import GenerationConfig

    document = json.loads(prompts_file.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(base_folder)
    template = tokenizer_chat_template(tokenizer)  # as in service: a control token in a message is text
    prompts = [template.tokens(chat) for chat in document["chats"]]
    # All special tokens end an answer, since engines differ in which of them they stop at.
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop_tokens = {*read_special_tokens(base_folder).ends, *special, *tokenizer.all_special_ids}
    pad = min(stop_tokens)
    own_config = model.generation_config
    # Not the model's own configuration, which may have penalties: the engine decodes without them.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=document["max_tokens"], eos_token_id=sorted(stop_tokens), pad_token_id=pad
    )
    answers = []
    try:
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch])  # left padding
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.inference_mode():
                output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            for generated in output[:, longest:].tolist():
                end = next((index for index, id in enumerate(generated) if id in stop_tokens), len(generated))
                answers.append(tokenizer.decode(generated[:end], skip_special_tokens=True))
    finally:
        model.generation_config = own_config
    answers_file.write_text(json.dumps(answers), encoding="utf-8")
