"""Train the starter model: a small Llama, from random weights, on plainly worded requests and their answers.

    python scripts/aec/make_starter_model.py            # a few minutes on two cores; see data/starter_model/README.md

The script writes tokenizer, weights and replay examples to `data/starter_model/`. Seeds and the number of threads are
fixed; another processor may still round differently.
"""

import argparse
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from make_benchmark import near, reserved
from wording import SLICES, answer_text, request, rotation

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

OUT = Path(__file__).parents[2] / "data" / "starter_model"
SEED = 7
EXAMPLES = 22_000
REPLAY = 300
THREADS = 2
BATCH = 48
# With AdamW alone for all weights, the model needs twice the data to learn to copy numbers.
MUON_LEARNING_RATE = 6e-3
ADAMW_LEARNING_RATE = 3e-3
PROMPT_WEIGHT = 0.1  # weight of the loss on the prompt, which trains the embedding of every token
VOCABULARY = 1024
MARKERS = ("<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Ordinary English for the tokenizer's training, so that its vocabulary covers words that no request uses.
ORDINARY = (
    "the quick brown fox jumps over the lazy dog while seven children play in the garden behind the old house",
    "please check whether this number is correct before you send the answer back to our office tomorrow morning",
    "we would rather keep what was agreed than change it again, because every change takes time and money",
    "What do you think about using the other one instead? It should work just as well for most people here.",
    "Every document has a title, a date, an author and a list of things that must still be done by somebody.",
    "Nobody knows exactly how long it will take, but it looks like several weeks or even more than a month.",
    "The assembly of parts, the enclosure, the opening and the line are shown together on the same sheet.",
    "I have to say that their first proposal was better than the second, although it cost quite a bit more.",
    "one two three four five six seven eight nine ten hours minutes days north south east west left right",
    "Then they went away, came back with a few questions, and asked us to explain everything once again.",
    "system user assistant You answer with one JSON object that describes the building element asked for",
)

Example = dict[str, str]


def examples(count: int, seed: int) -> Iterator[Example]:
    """Yield plain requests with their answers, all different, and no near-duplicate of the benchmark."""
    reserved_prompts, seen = reserved(), set[str]()
    for number, slice_name in enumerate(rotation(SLICES, count)):
        rng = Random(f"{seed}/{number}")  # one generator per request, so that dropping one changes no other
        while True:
            prompt, spec = request(slice_name, "plain", rng)
            if prompt not in seen and not near(prompt, reserved_prompts):
                break
        seen.add(prompt)
        yield {"prompt": prompt, "completion": answer_text(spec)}


def train_tokenizer(examples: list[Example], folder: Path) -> None:
    """Train a SentencePiece BPE tokenizer, and write it with the configuration that llama.cpp's converter reads."""
    import sentencepiece

    every_character = " ".join(chr(code) for code in range(33, 127))
    text = [line for example in examples[:6000] for line in example.values()]
    text += [line for line in (*ORDINARY, every_character) for _ in range(60)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        character_coverage=1.0, pad_id=3,
        user_defined_symbols=list(MARKERS), num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = ("<unk>", "<s>", "</s>", "<pad>", *MARKERS)
    added = {
        str(number): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": True}
        for number, name in enumerate(names)
    }  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "legacy": False, "clean_up_tokenization_spaces": False, "bos_token": "<s>", "eos_token": "<|im_end|>",
        "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 512, "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_model(eos: int) -> "LlamaForCausalLM":
    """Return a model with random weights. Its widths are 256 and 768, because K-quants need multiples of 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=eos, pad_token_id=3,
        )
    )  # fmt: skip


def encode(tokenizer: "PreTrainedTokenizerBase", example: Example) -> tuple[list[int], int]:
    """Return the token ids of prompt and completion, and the number of prompt tokens."""
    turn = [{"role": "user", "content": example["prompt"]}]
    prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    completion_ids = tokenizer.encode(example["completion"] + "<|im_end|>", add_special_tokens=False)
    return prompt_ids + completion_ids, len(prompt_ids)


def batches(rows: list[tuple[list[int], int]], rng: Random) -> list[list[tuple[list[int], int]]]:
    """Return batches of rows of similar length, which need little padding, in random order."""
    shuffled = sorted(rng.sample(rows, len(rows)), key=lambda row: len(row[0]))
    cut = [shuffled[at : at + BATCH] for at in range(0, len(shuffled), BATCH)]
    rng.shuffle(cut)
    return cut


def loss_of(model: "LlamaForCausalLM", batch: list[tuple[list[int], int]]) -> "torch.Tensor":
    """Return the cross-entropy of the completion plus PROMPT_WEIGHT times that of the prompt."""
    import torch
    from torch.nn import functional

    longest = (
        -(-max(len(ids) for ids, _ in batch) // 8) * 8
    )  # few different shapes, because kernels are compiled for each
    ids = torch.tensor([row + [3] * (longest - len(row)) for row, _ in batch])
    weight = torch.zeros(ids.shape)
    for index, (row, prompt_tokens) in enumerate(batch):
        weight[index, 1:prompt_tokens] = PROMPT_WEIGHT
        weight[index, prompt_tokens : len(row)] = 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=(ids != 3).long()).logits
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()


def optimizers(model: "LlamaForCausalLM") -> "list[torch.optim.Optimizer]":
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms."""
    import torch

    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.dim() == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: "LlamaForCausalLM", rows: list[tuple[list[int], int]]) -> None:
    """Train for one epoch with a cosine schedule."""
    import torch

    plan = batches(rows, Random(SEED))
    both = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / len(plan)))
        )
        for one in both
    ]
    started = time.monotonic()
    for step, batch in enumerate(plan):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == len(plan) - 1:
            print(f"step {step}/{len(plan)}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


def make(folder: Path, count: int) -> int:
    """Write tokenizer, weights and replay examples to an empty folder; return the number of parameters."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    drawn = list(examples(count + REPLAY, SEED))
    train_tokenizer(drawn, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = [encode(tokenizer, example) for example in drawn[:count]]
    print(f"{len(rows)} examples, {sum(len(ids) for ids, _ in rows)} tokens", flush=True)
    model = new_model(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    train(model, rows)
    model.to(torch.bfloat16).save_pretrained(folder)
    replay = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in drawn[count:])  # not trained on
    (folder / "replay.jsonl").write_text(replay, encoding="utf-8")
    return int(model.num_parameters())


def main() -> None:
    """Train in a temporary folder, and replace the files of the starter model when they are complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="number of different examples to train on")
    count = parser.parse_args().examples
    started = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT.parent, prefix=".starter_model-") as draft:
        parameters = make(Path(draft), count)
        for path in Path(draft).iterdir():
            path.chmod(0o644)
            path.replace(OUT / path.name)
    print(f"{OUT}: {parameters} parameters in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
