"""Dimensions of a base model, without loading it: from its config.json, or from a table of known families."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from finetune_pipeline.settings import TrainingSettings, project_path
from finetune_pipeline.training import padding_free
from finetune_pipeline.training.job import TrainingError


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a Llama-like decoder: grouped-query attention and a gated feed-forward layer."""

    name: str  # for messages
    layers: int
    hidden: int  # width of the residual stream
    ffn: int  # width within the feed-forward layer
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embeddings
    tied: bool = False  # embeddings and output layer share their weights
    qkv_bias: bool = False  # query, key and value have a bias (Qwen 2.5)
    qk_norm: bool = False  # query and key are normalized (Qwen 3, Gemma 3)
    norms: int = 2  # in a layer; 4 in Gemma
    other: int = 0  # parameters beside the language model, such as a vision tower, which are not trained
    padding_free: bool = True  # SFT trains on packed sequences (padding_free.py); else examples are padded

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: inputs and outputs of each."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of all decoder layers, which QLoRA holds in 4 bits."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings, and of the output layer unless it is tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.linear + self.embeddings + self.layers * (biases + norms) + self.hidden + self.other

    def trained(self, settings: TrainingSettings) -> int:
        """Return the parameters that an adapter of these settings trains.

        These are rank x (inputs + outputs) of each layer (LoRA, Hu et al. 2021), and embeddings of single tokens.
        """
        chosen = [
            shape
            for name, shape in self.projections.items()
            if settings.lora_target_modules == "all-linear" or name.endswith(settings.lora_target_modules)
        ]
        adapter = self.layers * sum(settings.lora_r * (inputs + outputs) for inputs, outputs in chosen)
        return adapter + self.trained_tokens(settings) * self.hidden

    def trained_tokens(self, settings: TrainingSettings) -> int:
        """Return the number of tokens whose embeddings are trained."""
        indices = settings.trainable_token_indices
        return self.vocabulary if indices == "all" else len(indices)


FAMILIES: dict[str, Architecture] = {
    family.name: family
    for family in (
        # name, layers, hidden, ffn, heads, kv_heads, head_dim, vocabulary
        Architecture("CodeLlama-7b", 32, 4096, 11008, 32, 32, 128, 32016),
        Architecture("Meta-Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256),
        Architecture("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
        Architecture("Llama-3.3-70B", 80, 8192, 28672, 64, 8, 128, 128256),
        Architecture("Mistral-7B", 32, 4096, 14336, 32, 8, 128, 32000),
        Architecture("Mistral-7B-v0.3", 32, 4096, 14336, 32, 8, 128, 32768),
        Architecture("Mistral-7B-Instruct-v0.3", 32, 4096, 14336, 32, 8, 128, 32768),
        Architecture("MermaidMistral", 32, 4096, 14336, 32, 8, 128, 32000),
        Architecture("deepseek-coder-6.7b", 32, 4096, 11008, 32, 32, 128, 32256),
        Architecture(
            "gemma-3-12b", 48, 3840, 15360, 16, 8, 256, 262208,
            tied=True, qk_norm=True, norms=4, other=421_000_000, padding_free=False,
        ),
        Architecture("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
        Architecture("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),
        Architecture("Qwen2.5-3B", 36, 2048, 11008, 16, 2, 128, 151936, tied=True, qkv_bias=True),
        Architecture("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
        Architecture("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064, qkv_bias=True),
        Architecture("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064, qkv_bias=True),
        Architecture("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936, tied=True, qk_norm=True),
        Architecture("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151936, tied=True, qk_norm=True),
        Architecture("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936, tied=True, qk_norm=True),
        Architecture("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
        Architecture("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936, qk_norm=True),
        Architecture("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936, qk_norm=True),
    )
}  # fmt: skip
"""Published dimensions (from each model's config.json), by the part of the id that names family and size."""


def architecture_of(base: str) -> Architecture:
    """Return the architecture of a base model: from its folder, Hugging Face's cache, or the table; never a download.

    Args:
        base: a folder, absolute or relative to the project, or a Hugging Face id.

    Raises:
        TrainingError: it is none of these, or its config.json is not of a Llama-like model.
    """
    folder = project_path(base)
    if (folder / "config.json").is_file():
        return read_architecture(folder / "config.json", base)
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "config.json")
        if isinstance(cached, str):
            return read_architecture(Path(cached), base)
    known = [name for name in FAMILIES if _size_name(base.rpartition("/")[2]).startswith(_size_name(name))]
    if not known:
        raise TrainingError(
            f"{base} is neither a folder with a config.json, nor downloaded, nor one of the families known here "
            f"({', '.join(FAMILIES)}); download it first (`hf download {base}`), or name one of these"
        )
    return FAMILIES[max(known, key=len)]


def _size_name(name: str) -> str:
    """Return a model's name without the parts that do not affect its dimensions.

    Llama 3.1 was published with and without "Meta-", and Qwen 2.5 Coder has the sizes of Qwen 2.5.
    """
    return name.lower().removeprefix("meta-").replace("qwen2.5-coder-", "qwen2.5-")


def read_architecture(path: Path, name: str) -> Architecture:
    """Return the architecture that a config.json describes; errors as of `architecture_of`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise TrainingError(f"{path} is not JSON ({error}); download {name} again") from error
    if not isinstance(config, dict):
        raise TrainingError(f"{path} holds {config!r:.40} instead of an object; download {name} again")
    merged = {**config, **(config.get("text_config") or {})}
    text = {key: value for key, value in merged.items() if value is not None}
    counts = {key: text.get(key, 1) for key in _COUNTS}
    wrong = [f"{key} {value!r}" for key, value in counts.items() if not isinstance(value, int) or value <= 0]
    if wrong:
        raise TrainingError(f"{path} has {', '.join(wrong)} instead of positive integers; download {name} again")
    if any(text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise TrainingError(f"{name} is a mixture of experts, whose memory cannot be estimated here yet")
    kind = str(text.get("model_type", ""))
    try:
        vision, other = config.get("vision_config") or {}, 0
        if "num_hidden_layers" in vision:  # estimated: per layer 4 h² of attention and 2 h f of feed-forward
            width = vision["hidden_size"]
            other = int(vision["num_hidden_layers"] * (4 * width * width + 2 * width * vision["intermediate_size"]))
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        return Architecture(
            name=name,
            layers=text["num_hidden_layers"],
            hidden=hidden,
            ffn=text["intermediate_size"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            vocabulary=text["vocab_size"],
            tied=text.get("tie_word_embeddings", kind.startswith("gemma")),
            qkv_bias=kind == "qwen2" or bool(text.get("attention_bias")),
            qk_norm=kind.startswith(("qwen3", "gemma3")),
            norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
            other=other,
            padding_free=padding_free.supports(SimpleNamespace(**{"model_type": "", **config})),
        )
    except KeyError as error:
        raise TrainingError(
            f"{path} has no {error}, so the memory of {name} cannot be estimated; this works for Llama-like models "
            "(Llama, Mistral, Qwen, Gemma and their derivatives)"
        ) from error


_COUNTS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
