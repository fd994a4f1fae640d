"""Tiny models of real families: random weights, with the family's own tokenizer, special tokens and chat template.

The tokenizers and templates are in llama.cpp's source package, from which set-up takes them. Gemma's tokenizer is in
no such file, so one of the same form is trained here.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import pytest

from finetune_pipeline_tests.families import CONTROL, LLAMA_3, NORMAL, QWEN, UNKNOWN, _training_text

MODELS = Path(sys.prefix) / "share" / "llama.cpp" / "models"
SENTENCEPIECE = 32_000
"""Tokens of the SentencePiece models; further ones of a family are added in tokenizer_config.json."""

WINDOW = 24
"""Sliding window of the families that have one; the tests' conversations are longer."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        kind: its class in transformers, without "ForCausalLM".
        template: name of a file of llama.cpp, or of a template of TRL.
        tokenizer: writes the tokenizer's files into a folder.
        end_of_turn: the token that the template writes after an answer, and `end_of_sequence` the tokenizer's EOS.
        bos: text of the token that every prompt begins with; None if it begins with none.
        config: of the model, as far as it differs from `SIZES`.
        config_class: its name in transformers, if it is not the kind's.
        refusal: what the template says to a system message, if it does not take one.
        alternates: the template rejects two user messages in a row.
    """

    kind: str
    template: str
    tokenizer: Callable[[Path], None]
    end_of_turn: str
    end_of_sequence: str
    bos: str | None
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str | None = None
    refusal: str | None = None
    alternates: bool = False


def template(name: str) -> str:
    """Return a chat template of llama.cpp's or TRL's, by its name."""
    path = MODELS / "templates" / f"{name}.jinja"
    found = path if path.is_file() else files("trl") / "chat_templates" / f"{name}.jinja"
    return found.read_text(encoding="utf-8")


def _vocabulary(name: str) -> Any:
    path = MODELS / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is missing; run make setup")
    fields = gguf.GGUFReader(path).fields
    return lambda key: fields[f"tokenizer.ggml.{key}"].contents()


def _write(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _added(texts: Mapping[int, str], rstrip: bool = False) -> dict[str, Any]:
    """Return `added_tokens_decoder` of a tokenizer_config.json, with special tokens."""
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False, "special": True}
    return {str(id): {"content": text, **flags} for id, text in texts.items()}


@cache
def _byte_level_bpe(name: str, split: str, bos: str | None) -> tuple[str, Mapping[int, str]]:
    """Return the tokenizer.json of a byte-level BPE, which adds BOS to texts if there is one, and special tokens."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

    read = _vocabulary(name)
    texts, kinds = read("tokens"), read("token_type")
    by_kind = {kind: {text: id for id, text in enumerate(texts) if kinds[id] == kind} for kind in (NORMAL, CONTROL)}
    merges = [tuple(pair.split(" ")) for pair in read("merges")]
    made = tokenizers.Tokenizer(models.BPE(by_kind[NORMAL], merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in by_kind[CONTROL]])
    if bos:
        added = [(bos, made.token_to_id(bos))]
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", added)
    return made.to_str(), {id: text for text, id in by_kind[CONTROL].items()}


def _byte_level(name: str, split: str, bos: str | None = None, **config: Any) -> Callable[[Path], None]:
    """Return what writes the files of a byte-level BPE."""

    def write(folder: Path) -> None:
        text, special = _byte_level_bpe(name, split, bos)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write(folder, bos_token=bos, added_tokens_decoder=_added(special), **config)

    return write


def _sentencepiece(name: str, more: Sequence[str], **config: Any) -> Callable[[Path], None]:
    """Return what writes the tokenizer.model of a family, whose publishers added tokens that absorb white space."""

    def write(folder: Path) -> None:
        read = _vocabulary(name)
        pieces = [*zip(read("tokens"), read("scores"), read("token_type"), strict=True)][:SENTENCEPIECE]
        _write_sentencepiece(folder, pieces)
        special = _added({0: "<unk>", 1: "<s>", 2: "</s>"})
        special |= _added(dict(enumerate(more, SENTENCEPIECE)), rstrip=True)
        config["tokenizer_class"] = "LlamaTokenizer"
        _write(folder, bos_token="<s>", unk_token="<unk>", legacy=not more, added_tokens_decoder=special, **config)
        if more:
            _write_prepending(folder)

    return write


def _write_prepending(folder: Path) -> None:
    """Write the tokenizer.json of Phi-3, which prepends a space after each special token."""
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    made = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.save(str(folder / "tokenizer.json"))


def _write_sentencepiece(folder: Path, pieces: Sequence[tuple[str, float, int]]) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for id, (text, score, kind) in enumerate(pieces):
        model.pieces.add(piece=text, score=score, type=UNKNOWN if id == 0 else CONTROL if id < 3 else kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


GEMMA = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<start_of_turn>", 5: "<end_of_turn>"}


def _gemma(folder: Path) -> None:
    """Train a SentencePiece model in Gemma's form, and write the tokenizer's files as they are published."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in _training_text() for line in text.splitlines() if line]),
            model_writer=file, model_type="bpe", vocab_size=900, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
            unk_piece="<unk>", user_defined_symbols=[GEMMA[4], GEMMA[5], "\n"], minloglevel=2,
        )  # fmt: skip
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    _write(folder, tokenizer_class="GemmaTokenizer", add_bos_token=True, added_tokens_decoder=_added(GEMMA), **special)


PHI_3 = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip

FAMILIES = {
    "llama": Family(
        "Llama", "meta-llama-Llama-3.2-3B-Instruct",
        _byte_level("llama-bpe", LLAMA_3, bos="<|begin_of_text|>", eos_token="<|eot_id|>"),
        "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", {"tie_word_embeddings": True},
    ),
    "qwen2.5": Family(
        "Qwen2", "Qwen-Qwen2.5-7B-Instruct",
        _byte_level("qwen2", QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "<|im_end|>", "<|im_end|>", None, {"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "Qwen3", "Qwen-Qwen3-0.6B",
        _byte_level("qwen2", QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "<|im_end|>", "<|im_end|>", None, {"tie_word_embeddings": True},
    ),
    "gemma2": Family(
        "Gemma2", "google-gemma-2-2b-it", _gemma, "<end_of_turn>", "<eos>", "<bos>",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32}, refusal="System role not supported", alternates=True,
    ),
    "gemma3": Family(
        "Gemma3", "gemma3", _gemma, "<end_of_turn>", "<eos>", "<bos>",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]},
        config_class="Gemma3TextConfig", alternates=True,
    ),
    "mistral": Family(
        "Mistral", "mistralai-Mistral-Nemo-Instruct-2407",
        _sentencepiece("llama-spm", (), eos_token="</s>", add_bos_token=True),
        "</s>", "</s>", "<s>", {"sliding_window": None}, alternates=True,
    ),
    "phi3": Family(
        "Phi3", "microsoft-Phi-3.5-mini-instruct",
        _sentencepiece("phi-3", PHI_3, eos_token="<|endoftext|>", pad_token="<|endoftext|>", add_bos_token=False),
        "<|end|>", "<|endoftext|>", None, {"sliding_window": None},
    ),
}  # fmt: skip


def write_model(name: str, folder: Path) -> Path:
    """Make a tiny model of a family in Hugging Face's layout, as its publishers lay it out."""
    import torch
    import transformers

    family = FAMILIES[name]
    folder.mkdir(parents=True)
    family.tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template(family.template))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    make = getattr(transformers, family.config_class or f"{family.kind}Config")
    # Random logits are far apart only with large weights; otherwise rounding decides which token is the likeliest.
    config = make(
        vocab_size=max(tokenizer.get_vocab().values()) + 1, initializer_range=0.3, **{**SIZES, **ids, **family.config}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.kind}ForCausalLM")(config)
    ends = dict.fromkeys([ids["eos_token_id"], tokenizer.convert_tokens_to_ids(family.end_of_turn)])
    model.generation_config = transformers.GenerationConfig(**{**ids, "eos_token_id": [*ends]})
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
