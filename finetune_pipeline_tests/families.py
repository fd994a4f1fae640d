"""Small tokenizers in the form of real model families, and the chat templates of these families.

A tokenizer has its family's type, pre-tokenizer and control tokens, but a vocabulary of a few hundred tokens, which is
trained here. The chat templates are those that TRL includes, which is a dependency; Mistral's is in this file.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf

from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.stories import STORIES_GGUF

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens
TRAINED_TOKENS = 700

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")

COMMAND_R = (
    "START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN", "START_RESPONSE",
    "END_RESPONSE", "START_THINKING", "END_THINKING", "START_ACTION",
)  # fmt: skip

# The form of Mistral's templates with system messages: the system message opens the last user message.
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("user and assistant messages must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""


@dataclass
class Tokenizer:
    """A tokenizer that can be written as a GGUF without weights.

    Attributes:
        model: llama.cpp's type of tokenizer, and `pre` its pre-tokenizer.
        name: the model's name in the GGUF, by which llama.cpp recognizes Phi-3.
        tokens: text and type of each token.
        special: token ids by name, such as "bos".
        merges: pairs of texts, for BPE.
        scores: for SentencePiece.
        split: the pre-tokenizer of a byte-level BPE as a regular expression.
    """

    model: str
    pre: str
    name: str
    tokens: list[tuple[str, int]]
    special: dict[str, int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[float] | None = None
    split: str | None = None

    def write(
        self, path: Path, template: str | None = None, declare: Callable[[Any], None] = lambda writer: None
    ) -> None:
        """Write a GGUF, with a chat template if one is given; `declare` gets the writer at the end."""
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(self.name)
        writer.add_context_length(512)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(self.tokens))
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([text for text, _ in self.tokens])
        writer.add_token_types([kind for _, kind in self.tokens])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(False)
        if self.merges:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        if template is not None:
            writer.add_chat_template(template)
        declare(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _training_text() -> list[str]:
    """Return text that never changes, so that a vocabulary is the same in every run."""
    questions = (PROJECT_ROOT / "data" / "benchmarks" / "aec_parser.jsonl").read_text(encoding="utf-8").splitlines()
    licence = (PROJECT_ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(keepends=True)
    return [*licence, *(json.loads(line)["prompt"] for line in questions)]


def _byte_level(pre: str, split: str, control: list[str], user_defined: list[str], **special: str) -> Tokenizer:
    """Train a byte-level BPE, as GPT-2, Qwen, Llama 3 and Command R have it."""
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        _training_text(),
        trainers.BpeTrainer(vocab_size=TRAINED_TOKENS, initial_alphabet=alphabet, show_progress=False),
    )
    document = json.loads(made.to_str())["model"]
    tokens = [(text, NORMAL) for text in sorted(document["vocab"], key=document["vocab"].get)]
    tokens += [(text, CONTROL) for text in control] + [(text, USER_DEFINED) for text in user_defined]
    ids = {text: number for number, (text, _) in enumerate(tokens)}
    merges = [tuple(pair) for pair in document["merges"]]
    return Tokenizer("gpt2", pre, pre, tokens, {name: ids[text] for name, text in special.items()}, merges, split=split)


def _gemma() -> Tokenizer:
    """Train a BPE of characters with byte fallback, as Gemma 4 has it; no token crosses a line break."""
    import tokenizers
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    made.train_from_iterator(_training_text(), trainers.BpeTrainer(vocab_size=TRAINED_TOKENS, show_progress=False))
    document = json.loads(made.to_str())["model"]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>"]
    tokens = [(text, UNKNOWN if text == "<unk>" else CONTROL) for text in control]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(text, NORMAL) for text in sorted(document["vocab"], key=document["vocab"].get)]
    merges = [tuple(pair) for pair in document["merges"]]
    return Tokenizer("gemma4", "gemma4", "gemma-4", tokens, {"pad": 0, "eos": 1, "bos": 2, "unk": 3}, merges)


def _phi_3() -> Tokenizer:
    """Return the SentencePiece vocabulary of the stories with Phi-3's control tokens."""
    fields = gguf.GGUFReader(STORIES_GGUF).fields
    texts, kinds, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "scores"))
    added = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    tokens = [*zip(texts, kinds, strict=True), *((text, CONTROL) for text in added)]
    special = {"bos": 1, "eos": len(texts), "unk": 0}
    return Tokenizer("llama", "default", "Phi-3", tokens, special, scores=[*scores, *[0.0] * len(added)])


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "qwen2": lambda: _byte_level(
        "qwen2", QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], bos="<|endoftext|>", eos="<|im_end|>"
    ),
    "llama-bpe": lambda: _byte_level(
        "llama-bpe",
        LLAMA_3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        + [f"<|reserved_special_token_{number}|>" for number in range(12)],
        [],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    # Only some of Command R's control tokens are marked as special.
    "command-r": lambda: _byte_level(
        "command-r",
        QWEN,
        ["<PAD>", "<UNK>", "<BOS_TOKEN>"],
        [f"<|{name}|>" for name in COMMAND_R],
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "gemma-4": _gemma,
    "phi-3": _phi_3,
}


@cache
def tokenizer(name: str) -> Tokenizer:
    """Return a family's tokenizer."""
    return FAMILIES[name]()


def chat_template(name: str) -> str:
    """Return the chat template with a name: one of TRL's, or "mistral"."""
    if name == "mistral":
        return MISTRAL
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def served_tokens(name, folder, template, conversations):
    """Return what the engine's process reads for each conversation: token ids and their text, or an error."""
    path = STORIES_GGUF
    if name != "llama-spm":
        path = folder / f"{name}.gguf"
        tokenizer(name).write(path)
    request = json.dumps({"gguf": str(path), "template": template, "conversations": conversations})
    command = [sys.executable, "-m", "finetune_pipeline_tests.inference.vocabulary"]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def transformers_tokenizer(name, template):
    """Return a family's tokenizer for transformers, with a chat template."""
    import tokenizers
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AddedToken, PreTrainedTokenizerFast

    own = tokenizer(name)
    ids = {text: number for number, (text, _) in enumerate(own.tokens)}
    if own.model == "gemma4":
        made = tokenizers.Tokenizer(BPE(ids, own.merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        made = tokenizers.Tokenizer(BPE(ids, own.merges, ignore_merges=name == "llama-bpe"))
        split = pre_tokenizers.Split(Regex(own.split), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
    special = {f"{key}_token": own.tokens[own.special[key]][0] for key in ("bos", "eos")}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    wrapped.add_tokens(
        [
            AddedToken(text, special=kind == CONTROL, normalized=False)
            for text, kind in own.tokens
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    wrapped.chat_template = template
    return wrapped
