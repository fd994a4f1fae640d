"""The examples of a job as tokens, made once and kept beside the dataset. Loads datasets and transformers."""

import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import hash_file, hash_of, package_versions
from finetune_pipeline.settings import REPLAY, TrainingSettings
from finetune_pipeline.training.conversations import Rejected, conversations, rejections
from finetune_pipeline.training.job import JobConfig, Rejection, TrainingError
from finetune_pipeline.training.sampling import by_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learnt, as PyTorch and Hugging Face have it."""

_COLUMNS = ("prompt", "history", "completion")
_REWARD = "reward"  # None in the tokens of a replayed example
_SOURCE = "source"
_REPLAYED = "replayed"
_PROVENANCE_COLUMNS = ("provenance", "interaction_id")
_REASON, _PROVENANCE = "rejected", "provenance"  # of an example that the chat template rejects; it has no tokens
_LOSS_SAMPLE = 256  # examples on which the loss is measured where there is no validation set
_TOKENISED = ".tokenised"
_FORM = 5  # of what lies there: another one is not read
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Data:
    """What a job trains on: datasets of `input_ids`, `labels` (IGNORED on the prompt), `length` in tokens, `reward`,
    and whether each is `replayed`."""

    train: "Dataset"
    measure: "Dataset"  # on which the loss before and after is measured
    too_long: int
    validates: bool  # whether `measure` is a validation set, or only a sample of what is trained on
    preferred: "Dataset | None" = None  # held-out preferences, by whose loss dpo and kto are validated
    rejections: tuple[Rejection, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example that is trained or measured on."""
        return int(max([*self.train["length"], *self.measure["length"]]))


def tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The base model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load(job: JobConfig, tokenizer: "PreTrainedTokenizerBase") -> Data:
    """Read the dataset of a job, as tokens.

    Raises:
        TrainingError: it is not there, lacks a column, or every example is too long.
    """
    if not (job.dataset / "dataset_dict.json").is_file():
        raise TrainingError(f"{job.dataset} holds no saved DatasetDict; make the dataset again")
    whole, rejected = _accepted(_tokenised(job, tokenizer, "train"), "train")
    train = _short_enough(whole, job)
    too_long = len(whole) - len(train)
    if not len(train) or (job.settings.method == "sft" and all(train[_REPLAYED])):
        raise TrainingError(nothing_left(too_long, len(whole), job.settings.max_length, rejected))
    held_out, rejected_too = _accepted(_tokenised(job, tokenizer, "validation"), "validation")
    validation = _short_enough(held_out, job)
    if job.settings.method == "sft" and not len(validation) and (len(held_out) or job.settings.early_stopping_patience):
        tell_not_validated(job.settings, len(held_out))
    measure = validation if len(validation) else train.select(range(min(len(train), _LOSS_SAMPLE)))
    if job.settings.reward_weighted and job.settings.method == "sft":
        if set(train[_REWARD]) == {None}:
            raise TrainingError(f"{job.dataset / 'train'} lacks the column reward; make the dataset again")
        # Decided here, so that a training that goes on sees what it saw before.
        train = train.select(by_reward(train[_REWARD], job.settings.seed))
    return Data(train, measure, too_long, bool(len(validation)), rejections=rejected + rejected_too)


def replayed(row: dict[str, Any]) -> bool:
    """Whether a row of a dataset is one that nobody judged, mixed in against forgetting: it is no reason to train."""
    return bool(row.get(_SOURCE) == REPLAY)


def nothing_left(too_long: int, accepted: int, max_length: int, rejected: tuple[Rejection, ...] = ()) -> str:
    """Return the message for a training in which every example that is not replayed is too long or rejected.

    Args:
        too_long: number of examples with more than `max_length` tokens.
        accepted: number of examples that the chat template accepts.
        max_length: tokens that an example may have.
        rejected: the examples that the chat template rejects.
    """
    examples = accepted + sum(one.count for one in rejected)
    why, remedy = [], []
    if rejected:
        reasons = "; ".join(f"{one.count} of {examples} examples are rejected: {one}" for one in rejected)
        why.append(reasons)
        remedy.append("take a base model whose chat template accepts such conversations")
    if too_long or not rejected:
        why.append(f"{too_long} of {examples} examples have more than {max_length} tokens")
        remedy.append("raise max_length")
    if too_long < accepted:
        why[-1] += f", and the other {accepted - too_long} are only replayed"
    return f"nothing is left to train on: {'; '.join(why)}; {', '.join(remedy)}, or add examples"


def tell_not_validated(settings: TrainingSettings, held_out: int) -> None:
    """Say in the log that nothing that was held out can be validated on: `held_out` examples, all too long."""
    why = f"all {held_out} validation examples have more than {settings.max_length} tokens (raise max_length)"
    if not held_out:
        why = "the dataset has too few validation examples (raise curation.validation_fraction, or add examples)"
    stopping = " and early_stopping_patience does nothing" if settings.early_stopping_patience else ""
    print(f"the training is not validated, so the last weights stay{stopping}: {why}", file=sys.stderr, flush=True)


def _accepted(rows: "Dataset", split: str) -> "tuple[Dataset, tuple[Rejection, ...]]":
    """Return the examples that the chat template accepts, and why it rejects the others."""
    reasons, provenance = rows[_REASON], rows[_PROVENANCE]
    rejected = [Rejected(reason, where) for reason, where in zip(reasons, provenance, strict=True) if reason]
    if rejected:
        rows = rows.select([index for index, reason in enumerate(reasons) if not reason])
    return rows.remove_columns([_REASON, _PROVENANCE]), rejections(rejected, len(reasons), split)


def _short_enough(rows: "Dataset", job: JobConfig) -> "Dataset":
    kept = [index for index, length in enumerate(rows["length"]) if length <= job.settings.max_length]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _tokenised(job: JobConfig, tokenizer: "PreTrainedTokenizerBase", split: str) -> "Dataset":
    """A split as tokens: read where an earlier training of the same texts left it, else made and left there.

    It lies within the dataset's own folder, so that who deletes the texts deletes the tokens too.
    """
    from datasets import load_from_disk

    final = job.dataset / _TOKENISED / f"{split}-{_key(job, split)}"
    if final.is_dir():
        return load_from_disk(str(final))
    made = _tokenise(_split(job.dataset, split), job.system_prompt, tokenizer)
    if len(made):  # datasets cannot read an empty one back
        _keep(made, final)
    return made


def _key(job: JobConfig, split: str) -> str:
    """Hash (16 hex digits) of all that decides the tokens: the rows, the system prompt, the tokenizer."""
    files = [job.dataset / split / name for name in _data_files(job.dataset / split)]
    files += sorted(path for pattern in _TOKENIZER_FILES for path in job.base_model.glob(pattern))
    hashes = {path.name: hash_file(path) for path in files}
    return hash_of([_FORM, job.system_prompt, hashes, package_versions("transformers", "tokenizers")])[:16]


def _keep(rows: "Dataset", final: Path) -> None:
    """Write the tokens so that a kill leaves all of them or none. Where nothing can be written, they are made anew."""
    try:
        final.parent.mkdir(exist_ok=True)
        draft = final.with_name(f".draft-{final.name}-{os.getpid()}")
        draft.mkdir(exist_ok=True)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return
        raise
    try:
        rows.save_to_disk(draft)
        draft.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster, and left the same
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _split(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a saved split; a missing one has none, and an empty one neither (datasets cannot read that back)."""
    from datasets import load_from_disk

    if not _data_files(folder / name):
        return []
    rows = load_from_disk(str(folder / name))
    missing = set(_COLUMNS) - set(rows.column_names)
    if missing:
        raise TrainingError(f"{folder / name} lacks the column {' and '.join(sorted(missing))}; make the dataset again")
    return list(
        rows.select_columns(
            [name for name in (*_COLUMNS, _REWARD, _SOURCE, *_PROVENANCE_COLUMNS) if name in rows.column_names]
        )
    )


def _data_files(split: Path) -> list[str]:
    """The files of a saved split, by name; others may lie beside them. A split that is not there has none."""
    state = split / "state.json"
    if not state.is_file():
        return []
    return [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]


def _tokenise(rows: list[dict[str, Any]], system_prompt: str, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    from datasets import Dataset, Features, List, Value

    kinds = {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        _REWARD: Value("float64"),
        _REPLAYED: Value("bool"),
        _REASON: Value("string"),
        _PROVENANCE: Value("string"),
    }
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    for row, found in zip(rows, conversations(rows, ["completion"], system_prompt, tokenizer), strict=True):
        if isinstance(found, Rejected):
            ids: list[int] = []
            labels: list[int] = []
            why: str | None = found.reason
            where: str | None = found.provenance
        else:
            ids, why, where = found.answers["completion"], None, None
            labels = labels_of(found.prompt, ids)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["length"].append(len(ids))
        columns[_REWARD].append(None if replayed(row) else row.get(_REWARD))
        columns[_REPLAYED].append(replayed(row))
        columns[_REASON].append(why)
        columns[_PROVENANCE].append(where)
    return Dataset.from_dict(columns, Features(kinds))


def labels_of(prompt: list[int], ids: list[int]) -> list[int]:
    """Return the labels: the tokens after the prompt, or from where the template or tokenizer writes it differently."""
    same = next((place for place, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), None)
    start = max(len(prompt) if same is None else same, 1)  # nothing stands before the first token to predict it from
    return [IGNORED] * start + ids[start:]
