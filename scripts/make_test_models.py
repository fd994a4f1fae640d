"""Train the model of the tests: a tiny Llama that tells short stories, with its tokenizer and its GGUF.

    .venv/bin/python scripts/make_test_models.py        # about a minute on one core

The tests of the engine and of the export need a trained model, whose greedy text is known and repeats in another
runtime. The stories are made of the sentences below. The result is in `finetune_pipeline_tests/data/stories/`; a test
compares it with this script. Seeds and the number of threads are fixed; another processor may still round differently.
"""

import argparse
import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from finetune_pipeline.export.gguf import convert

if TYPE_CHECKING:
    import torch

OUT = Path(__file__).parents[1] / "finetune_pipeline_tests" / "data" / "stories"
CHECKSUMS = "checksums.json"
SEED = 11
THREADS = 1
STORIES = 6000
STEPS = 500
BATCH = 16
LENGTH = 128  # tokens of a row
LEARNING_RATE = 6e-3
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 108, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
"""Rows of 64 are a multiple of 32 but not of 256, and 108 of neither: block quantization needs its fallbacks."""

OPENING = (
    "Once upon a time, there was a girl named Lily. She lived in a small house near the park. One day, Lily found a "
    "big, red ball under a tree."
)
"""The greedy text of the model from an empty prompt."""

# The first choice of each list is the most frequent one, so that no greedy token is close to a tie.
NAMES = ("Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Rosa", "Max")
ANIMALS = ("dog", "cat", "bird", "fox", "duck", "horse")
COLORS = ("red", "blue", "green", "yellow", "white")
SIZE_WORDS = ("big", "small", "old", "new", "round")
THINGS = ("ball", "kite", "box", "boat", "book", "hat", "drum")
PLACES = ("under a tree", "near the park", "in the garden", "by the river", "behind the house", "at the school")
FEELINGS = ("happy", "sad", "tired", "proud", "hungry")
OPENINGS = (
    "Once upon a time, there was a {kind} named {name}. {She} lived in a small house {place}.",
    "{name} and {his} {animal} lived {place}. They had a {size}, {color} {thing}.",
    "The sun was warm. {name} and {his} friend wanted to play {place}.",
    "A {size} {animal} sat {place}. {name} saw the {animal} and smiled.",
    "One day, a {animal} came to {name}. The {animal} was {feeling}.",
    'Mom said to {name}, "Please find my {color} {thing}." {name} was {feeling}.',
    "It was a warm day. {name} was {feeling}, and {his} {animal} was {feeling}, too.",
    "{name} had a {size}, {color} {thing}. {She} liked the {thing} very much.",
)
MIDDLES = (
    "One day, {name} found a {size}, {color} {thing} {place}.",
    '"Look, a {thing}!" said {name} to the {animal}.',
    "The {animal} took the {thing} and ran away.",
    "{name} looked for the {thing} {place}, but it was not there.",
    "Then {name} saw {other} with a {color} {thing}.",
    '"Is this your {thing}?" asked {other}. "Yes, it is!" said {name}.',
    "They played with the {thing} for {count} hours.",
    "{She} was very {feeling} and wanted to go home.",
    "The {animal} wanted to play, too, so {name} gave it the {thing}.",
)
ENDINGS = (
    "{name} and {other} were friends from that day on.",
    "At night, {name} put the {thing} next to the bed and slept.",
    "Mom and Dad were {feeling}. They all went home and had soup.",
)
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
EXTRA = " ".join(chr(code) for code in range(33, 127))
"""Every printable ASCII character is a token, although most do not occur in a story."""


def pick(rng: Random, choices: Sequence[str]) -> str:
    """Return a choice; each is twice as likely as the one after it."""
    return rng.choices(choices, [2.0**-rank for rank in range(len(choices))])[0]


def story(rng: Random) -> str:
    """Return a story of an opening, some middles and an ending about the same name, animal and thing."""
    name = pick(rng, NAMES)
    girl = name in {"Lily", "Anna", "Mia", "Rosa"}
    fixed = {
        "name": name, "other": pick(rng, [one for one in NAMES if one != name]), "kind": "girl" if girl else "boy",
        "She": "She" if girl else "He", "his": "her" if girl else "his", "animal": pick(rng, ANIMALS),
        "thing": pick(rng, THINGS),
    }  # fmt: skip

    def tell(sentence: str) -> str:
        return sentence.format(
            **fixed, size=pick(rng, SIZE_WORDS), color=pick(rng, COLORS), place=pick(rng, PLACES),
            feeling=pick(rng, FEELINGS), count=rng.randint(2, 9),
        )  # fmt: skip

    middles = [pick(rng, MIDDLES) for _ in range(rng.randint(3, 6))]
    return " ".join(tell(one) for one in (pick(rng, OPENINGS), *dict.fromkeys(middles), pick(rng, ENDINGS)))


def stories() -> list[str]:
    """Return the training texts. A third of them begin with OPENING, so that the model knows it by heart."""
    texts = []
    for number in range(STORIES):
        rng = Random(f"{SEED}/{number}")
        text = story(rng)
        if number % 3 == 0:
            rest = [one for one in MIDDLES if "{other}" not in one and one != MIDDLES[0]]
            ball = {"name": "Lily", "animal": "dog", "thing": "ball", "She": "She", "count": 2}
            told = [
                one.format(**ball, color=pick(rng, COLORS), place=pick(rng, PLACES), feeling=pick(rng, FEELINGS))
                for one in dict.fromkeys(pick(rng, rest) for _ in range(5))
            ]
            text = " ".join([OPENING, *told])
        texts.append(text)
    return texts


def write_tokenizer(folder: Path) -> None:
    """Write a SentencePiece BPE tokenizer as Llama 2 has it: byte fallback, and a space before the first word."""
    import sentencepiece
    from transformers import AutoTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*stories()[:2000], EXTRA]), model_writer=model, model_type="bpe",
        vocab_size=SIZES["vocab_size"], byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = ("<unk>", "<s>", "</s>")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "clean_up_tokenization_spaces": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 512, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(number): {"content": name, **flags} for number, name in enumerate(names)},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def rows(folder: Path) -> "torch.Tensor":
    """Return the stories as rows of LENGTH tokens: each begins with BOS, ends with EOS and is padded with EOS."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoded = [[*tokenizer.encode(text), 2][:LENGTH] for text in stories()]
    return torch.tensor([row + [2] * (LENGTH - len(row)) for row in encoded])


def train(folder: Path) -> int:
    """Write a trained model; return its number of parameters."""
    import torch
    from torch.nn import functional
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=None))
    data = rows(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    for step in range(STEPS):
        ids = data[torch.randint(len(data), (BATCH,))]
        targets = ids[:, 1:].clone()
        targets[:, 1:][(targets[:, 1:] == 2) & (targets[:, :-1] == 2)] = -100  # the padding
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}/{STEPS}  loss {loss.item():.4f}", flush=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def recipe() -> str:
    """Return a hash of everything that training depends on."""
    made_of = {"texts": stories(), "sizes": SIZES, "numbers": [SEED, STEPS, BATCH, LENGTH, LEARNING_RATE]}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the hash of the recipe and of every file in a folder."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {"recipe": recipe(), **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


def make(folder: Path) -> int:
    """Write tokenizer, weights, GGUF and checksums to an empty folder; return the number of parameters."""
    write_tokenizer(folder)
    parameters = train(folder)
    convert(folder, folder / "model.gguf")
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=2) + "\n", encoding="utf-8")
    return parameters


def main() -> None:
    """Train in a temporary folder, and replace the files of the model when they are complete."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    started = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT.parent, prefix="stories-") as draft:
        folder = Path(draft) / OUT.name  # the GGUF gets the folder's name
        folder.mkdir()
        parameters = make(folder)
        for path in folder.iterdir():
            path.chmod(0o644)
            path.replace(OUT / path.name)
    print(f"{OUT}: {parameters} parameters in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
