"""SFT without padding: the examples of a batch are packed into one sequence. Loads torch, transformers and trl.

Layers that look at one token at a time, which is nearly all of the computation, process no padding. Attention unpacks
the sequence into one row per example and repacks the result. It is causal, and padding comes after the text, so no
token attends to another example or to padding; positions start at 0 in each example. Logits are computed only at
positions whose next token is part of a completion, and in chunks, so that they stay small. TRL's entropy and accuracy
of every step, which nobody reads, are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from finetune_pipeline.training.conversations import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from trl import SFTTrainer

ATTENTION = "within_each_example"
"""Name of the unpacking attention in transformers."""

_ARCHITECTURES = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
"""Architectures for which a test shows that packed examples give the same gradients as alone. Others may look alike and
have more: attention sinks, soft-capped logits, layers that carry a state along the sequence."""
_LOGITS = 2**22
"""Logits (tokens x vocabulary) that are computed at once, for at least CHUNK_TOKENS tokens."""
CHUNK_TOKENS = 256
_ROUND_TOKENS, _ROUND_LENGTHS = 128, 16  # sequences, and examples and completions, are rounded up to multiples of these
_SHORT = 256  # tokens up to which the attention scores of all examples fit into memory as a matrix


def supports(config: "PretrainedConfig | SimpleNamespace") -> bool:
    """Return whether examples of this architecture can be packed: only plain causal attention mixes its tokens."""
    capped = (getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping"))
    return config.model_type in _ARCHITECTURES and not any(capped)


def tokens_per_chunk(vocabulary: int) -> int:
    """Return the number of completion tokens whose logits are in memory together."""
    return max(CHUNK_TOKENS, _LOGITS // vocabulary)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pack examples into one sequence.

    Args:
        examples: each with `input_ids` and `labels` of the same length.

    Returns:
        input_ids, position_ids: (1, tokens), the packed tokens and the padding after them.
        unpack: (examples, longest), for each position of an example its index in the sequence; 0 beyond its end.
        repack: (tokens), for each index in the sequence its position in `unpack`, flattened.
        logits_to_keep: (completion tokens), the indices from which a completion token is predicted.
        labels: (1, completion tokens), those tokens; IGNORE_INDEX for padding.
        tokens: number of tokens without padding.
    """
    import torch

    tokens = sum(len(example["input_ids"]) for example in examples)
    padding = _round_up(tokens, _ROUND_TOKENS) - tokens
    if padding:
        # An example without a loss pads the sequence: oneDNN compiles, and keeps, code for each new shape.
        examples = [*examples, {"input_ids": [0] * padding, "labels": [IGNORE_INDEX] * padding}]
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    positions = torch.arange(_round_up(int(lengths.max()), _ROUND_LENGTHS))
    filled = positions < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    labels = torch.tensor([label for example in examples for label in [*example["labels"][1:], IGNORE_INDEX]])
    keep = (labels != IGNORE_INDEX).nonzero()[:, 0]
    keep = torch.cat([keep, keep.new_full((_round_up(len(keep), _ROUND_LENGTHS) - len(keep),), len(labels) - 1)])
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
        "position_ids": positions.expand(filled.shape)[filled][None],
        "unpack": (starts[:, None] + positions) * filled,
        "repack": filled.flatten().nonzero()[:, 0],
        "logits_to_keep": keep,
        "labels": labels[keep][None],
        "tokens": torch.tensor(tokens),
    }


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def register_attention() -> str:
    """Register the attention with transformers, and return its name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    return ATTENTION


def _attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: None,
    *,
    unpack: "torch.Tensor",
    repack: "torch.Tensor",
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """Compute attention within each example of a packed sequence (1, heads, tokens, size); called by transformers."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    longest = unpack.shape[1]

    def unpacked(states: torch.Tensor) -> torch.Tensor:  # (examples, heads, longest, size)
        rows = states.transpose(1, 2)[0].index_select(0, unpack.flatten())
        return rows.view(*unpack.shape, *rows.shape[1:]).transpose(1, 2)

    query, key, value = unpacked(query), unpacked(key), unpacked(value)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and longest <= _SHORT and not dropout:
        # On a CPU, in bfloat16 and for short examples, plain matrix products are three times as fast as the kernel.
        attended = _attention_by_matrices(query, key, value, scaling, sliding_window)
    else:
        window = None
        if sliding_window is not None and sliding_window < longest:
            window = _visible(longest, sliding_window, query.device)[None, None]
        # On a CPU the kernel for bfloat16 is slower than the one for float32.
        dtype = torch.float32 if query.device.type == "cpu" else query.dtype
        states = (query.to(dtype), key.to(dtype), value.to(dtype))
        attended = sdpa_attention_forward(module, *states, window, dropout, scaling, is_causal=True)[0].to(query.dtype)
    rows = attended.reshape(unpack.numel(), *attended.shape[2:])
    return rows.index_select(0, repack)[None], None


def _attention_by_matrices(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", scaling: float, window: int | None
) -> "torch.Tensor":
    """Compute attention with its scores as a matrix; heads that share a key are stacked below each other."""
    import torch

    examples, heads, longest, size = query.shape
    group = heads // key.shape[1]
    query = query.reshape(-1, group * longest, size)
    key, value = key.reshape(-1, longest, size), value.reshape(-1, longest, value.shape[-1])
    mask = torch.zeros(longest, longest, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill(~_visible(longest, window, query.device), float("-inf")).repeat(group, 1)
    scores = torch.baddbmm(mask[None], query, key.transpose(1, 2), alpha=scaling)
    attended = scores.softmax(-1).to(value.dtype) @ value
    return attended.view(examples, heads, longest, -1).transpose(1, 2)


def _visible(longest: int, window: int | None, device: "torch.device") -> "torch.Tensor":
    """Return which token (row) attends to which (column): itself and those before it, within the window."""
    import torch

    visible = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def patch_head(head: Any) -> None:
    """Patch lm_head to return per-token losses instead of logits (chunked cross-entropy) within `predict`.

    With a vocabulary of 128,000, the logits of a batch would take gigabytes. They are computed for a chunk of tokens at
    a time, and again in the backward pass. This happens within the layer's own forward, so everything that wraps the
    layer or the model (an adapter, several processes) keeps working.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    compute_logits = head.forward
    head.predicted_tokens = None

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(compute_logits(hidden).float(), labels, reduction="none")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if head.predicted_tokens is None:
            return cast("torch.Tensor", compute_logits(hidden))
        size = tokens_per_chunk(head.weight.shape[0])
        chunks = list(zip(hidden[0].split(size), head.predicted_tokens[0].split(size), strict=True))
        if len(chunks) == 1:
            return loss(*chunks[0])[None, :, None]
        return torch.cat([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks])[None, :, None]

    head.forward = forward


@contextmanager
def predict(head: Any, labels: "torch.Tensor") -> Iterator[None]:
    """Have a patched lm_head return the losses of these tokens (1, tokens) as (1, tokens, 1)."""
    head.predicted_tokens = labels
    try:
        yield
    finally:
        head.predicted_tokens = None


def summed_loss(outputs: Any, labels: "torch.Tensor", num_items_in_batch: "torch.Tensor | None" = None) -> Any:
    """Return the losses of a packed batch, summed, and divided by the number of completion tokens of the update."""
    total = outputs.logits.sum()  # losses at IGNORE_INDEX are 0
    return total / ((labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


def completion_tokens(batch: dict[str, Any]) -> int:
    """Return the number of completion tokens that a batch predicts, of `collate` or of TRL's own collator."""
    labels = batch["labels"] if "unpack" in batch else batch["labels"][:, 1:]
    return int((labels != IGNORE_INDEX).sum())


def trainer_class() -> "type[SFTTrainer]":
    """Return TRL's SFTTrainer for batches of `collate`."""
    from transformers import Trainer
    from trl import SFTTrainer

    class PaddingFreeTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
        def __init__(self, **arguments: Any) -> None:
            super().__init__(data_collator=collate, compute_loss_func=summed_loss, **arguments)
            self._loss_shifts_labels = False  # the labels are the next tokens already
            self._head = self.model.get_output_embeddings()
            patch_head(self._head)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs.pop("_prediction_loss_only", None)
            tokens = inputs.pop("tokens")
            if self.model.training:
                ranks = self.accelerator
                self._total_train_tokens += int(ranks.gather(tokens).sum() if ranks.num_processes > 1 else tokens)
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            inputs["use_cache"] = False
            with predict(self._head, inputs["labels"]):
                return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return PaddingFreeTrainer
