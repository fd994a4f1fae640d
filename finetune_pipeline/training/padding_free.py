"""Steps without padding: the examples of a batch lie one after the other in one row. Loads torch, transformers and trl.

All that looks at one token at a time, and so nearly all of the arithmetic, then sees text only. Attention looks at
examples: it takes the row apart, one row for each example, and puts the result together again. Since it is causal and
what fills a row up stands behind the text, no token sees another example or the filling. Positions begin anew in each
example. The vocabulary is scored only where an answer's token is foretold, so many of them at a time that the scores
stay small; TRL's entropy and accuracy of every step, which nobody reads, are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from finetune_pipeline.training.data import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from trl import SFTTrainer

ATTENTION = "within_each_example"
"""The name under which transformers knows the attention that takes rows apart."""

_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
"""Architectures for which a test holds that examples in one row learn what they learn alone. Others may look alike and
do more: attention sinks, capped scores, layers that carry a state along."""
_SCORES = 2**22
"""Scores (tokens x words) that are computed at a time, of at least CHUNK_TOKENS tokens."""
CHUNK_TOKENS = 256
_TOKENS, _LENGTHS = 128, 16  # a row has a multiple of so many tokens, its examples and answers of so many
_SHORT = 256  # tokens, below which scores fit into memory as a matrix


def fits(config: "PretrainedConfig | SimpleNamespace") -> bool:
    """Whether examples of this architecture can share a row: its layers mix tokens by plain causal attention alone."""
    capped = (getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping"))
    return config.model_type in _FAMILIES and not any(capped)


def tokens_at_a_time(vocabulary: int) -> int:
    """Answers' tokens whose scores are in memory together."""
    return max(CHUNK_TOKENS, _SCORES // vocabulary)


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all examples, and where in it each of them lies.

    Args:
        examples: each with `input_ids` and `labels` of the same length.

    Returns:
        input_ids, position_ids: of shape (1, places): the tokens, and what fills them up.
        apart: (examples, longest), for each place of an example its place in the row; 0 behind its end.
        together: (places), for each place in the row its place in `apart`, flattened.
        logits_to_keep: (answers), the places from which an answer's token is foretold.
        labels: (1, answers), those tokens; IGNORED where they are filled up.
        tokens: of text.
    """
    import torch

    tokens = sum(len(example["input_ids"]) for example in examples)
    examples = [*examples, *_filling(tokens)]
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    places = torch.arange(_rounded(int(lengths.max()), _LENGTHS))
    filled = places < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    labels = torch.tensor([label for example in examples for label in [*example["labels"][1:], IGNORED]])
    keep = (labels != IGNORED).nonzero()[:, 0]
    keep = torch.cat([keep, keep.new_full((_rounded(len(keep), _LENGTHS) - len(keep),), len(labels) - 1)])
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]]),
        "position_ids": places.expand(filled.shape)[filled][None],
        "apart": (starts[:, None] + places) * filled,
        "together": filled.flatten().nonzero()[:, 0],
        "logits_to_keep": keep,
        "labels": labels[keep][None],
        "tokens": torch.tensor(tokens),
    }


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


def _filling(tokens: int) -> list[dict[str, Any]]:
    """An example that is not learnt and rounds a row up: for each new shape oneDNN makes, and keeps, new code."""
    missing = _rounded(tokens, _TOKENS) - tokens
    return [{"input_ids": [0] * missing, "labels": [IGNORED] * missing}] if missing else []


def register_attention() -> str:
    """Tell transformers of the attention, and return its name for `attn_implementation`."""
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
    apart: "torch.Tensor",
    together: "torch.Tensor",
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """Attention of the one row (1, heads, tokens, size), within each example; as transformers calls it."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (_taken_apart(states, apart) for states in (query, key, value))
    longest = apart.shape[1]
    if _scores_as_a_matrix(query, longest, dropout):
        mixed = _by_matrices(query, key, value, scaling, sliding_window)
    else:
        window = None
        if sliding_window is not None and sliding_window < longest:
            window = _seen(longest, sliding_window, query.device)[None, None]
        # On a CPU the kernel for bfloat16 is slower than the one for float32.
        kind = torch.float32 if query.device.type == "cpu" else query.dtype
        states = (query.to(kind), key.to(kind), value.to(kind))
        mixed = sdpa_attention_forward(module, *states, window, dropout, scaling, is_causal=True)[0].to(query.dtype)
    rows = mixed.reshape(apart.numel(), *mixed.shape[2:])
    return rows.index_select(0, together)[None], None


def _taken_apart(states: "torch.Tensor", apart: "torch.Tensor") -> "torch.Tensor":
    """(1, heads, tokens, size) as (examples, heads, longest, size)."""
    moved = states.transpose(1, 2)[0].index_select(0, apart.flatten())
    return moved.view(*apart.shape, *moved.shape[1:]).transpose(1, 2)


def _scores_as_a_matrix(query: "torch.Tensor", longest: int, dropout: float) -> bool:
    """On a CPU, in bfloat16 and on short rows, plain matrix products are three times faster than the fused kernel."""
    import torch

    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and longest <= _SHORT and not dropout


def _by_matrices(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", scaling: float, window: int | None
) -> "torch.Tensor":
    """Attention with its scores written out; the heads that share a key are laid one below the other."""
    import torch

    examples, heads, longest, size = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(-1, shared * longest, size)
    key, value = key.reshape(-1, longest, size), value.reshape(-1, longest, value.shape[-1])
    hidden = torch.zeros(longest, longest, dtype=query.dtype, device=query.device)
    hidden = hidden.masked_fill(~_seen(longest, window, query.device), float("-inf")).repeat(shared, 1)
    scores = torch.baddbmm(hidden[None], query, key.transpose(1, 2), alpha=scaling)
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.view(examples, heads, longest, -1).transpose(1, 2)


def _seen(longest: int, window: int | None, device: "torch.device") -> "torch.Tensor":
    """Which token (row) sees which (column): itself and those before it, within the window if there is one."""
    import torch

    seen = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def score_in_chunks(head: Any) -> None:
    """Have an output layer give the loss of each token that it is told to foretell, instead of its scores.

    A layer of 128,000 words would fill gigabytes with the scores of a batch. They are computed for a few tokens at a
    time, and once more for the backward pass. It happens within the layer's own call, so that whatever wraps it or the
    model (an adapter, several processes) stays in force.

    Args:
        head: the model's output layer; it is told by `foretell`, and without that does what it always did.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    scores = head.forward
    head.foretold = None

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(scores(hidden).float(), labels, reduction="none")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if head.foretold is None:
            return cast("torch.Tensor", scores(hidden))
        size = tokens_at_a_time(head.weight.shape[0])
        parts = list(zip(hidden[0].split(size), head.foretold[0].split(size), strict=True))
        if len(parts) == 1:
            return loss(*parts[0])[None, :, None]
        return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts])[None, :, None]

    head.forward = forward


@contextmanager
def foretell(head: Any, labels: "torch.Tensor") -> Iterator[None]:
    """Within it, the output layer gives the losses of these tokens (1, answers), as (1, answers, 1)."""
    head.foretold = labels
    try:
        yield
    finally:
        head.foretold = None


def answer_loss(outputs: Any, labels: "torch.Tensor", num_items_in_batch: "torch.Tensor | None" = None) -> Any:
    """The losses of a batch of `collate`: summed over the answers' tokens, by their number in the whole update."""
    total = outputs.logits.sum()  # of what is IGNORED it is 0
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def answers(batch: dict[str, Any]) -> int:
    """The answers' tokens that a batch foretells, of `collate` or of TRL's own collator."""
    labels = batch["labels"] if "apart" in batch else batch["labels"][:, 1:]
    return int((labels != IGNORED).sum())


def trainer_class() -> "type[SFTTrainer]":
    """TRL's SFTTrainer for batches of `collate`."""
    from transformers import Trainer
    from trl import SFTTrainer

    class UnpaddedTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
        def __init__(self, **arguments: Any) -> None:
            super().__init__(data_collator=collate, compute_loss_func=answer_loss, **arguments)
            self._loss_shifts_labels = False  # they are the next tokens already
            self._head = self.model.get_output_embeddings()
            score_in_chunks(self._head)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs.pop("_prediction_loss_only", None)
            tokens = inputs.pop("tokens")
            if self.model.training:
                self._total_train_tokens += _over_all_processes(self.accelerator, tokens)
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            inputs["use_cache"] = False
            with foretell(self._head, inputs["labels"]):
                return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return UnpaddedTrainer


def _over_all_processes(accelerator: Any, count: "torch.Tensor") -> int:
    return int(accelerator.gather(count).sum() if accelerator.num_processes > 1 else count)
