"""The files of a dataset: three Hugging Face datasets in TRL's dataset types, and where each example came from.

    prompt_completion/     for SFT: prompt, completion; replay examples included
    preference/            for DPO: prompt, chosen (a correction), rejected (the model's own answer)
    unpaired_preference/   for KTO: prompt, completion, label (desirable or not)
    card.md                what the dataset is made of, for people
    provenance.csv         source, provenance, interaction id and split of each example of prompt_completion/

Each dataset has the splits train and validation, and a column `history` with the turns before the prompt. pyarrow
writes the layout that `datasets.load_from_disk` reads: importing `datasets` takes a second, half as long as it takes to
curate 10,000 examples.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune_pipeline.artifacts import hash_file, write_text
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.records import Turn, conversation_text, text_hash

PROMPT_COMPLETION, PREFERENCE, UNPAIRED_PREFERENCE = "prompt_completion", "preference", "unpaired_preference"
SPLITS = ("train", "validation")
PROVENANCE_FILE, DATASET_CARD = "provenance.csv", "card.md"

COLUMNS = {
    PROMPT_COMPLETION: {
        "prompt": "string", "history": "turns", "completion": "string", "reward": "float64", "source": "string",
        "provenance": "string", "interaction_id": "string", "content_hash": "string",
        "author": "string", "domain": "string", "kind": "string", "created_at": "time",
    },
    PREFERENCE: {
        "prompt": "string", "history": "turns", "chosen": "string", "rejected": "string", "interaction_id": "string",
    },
    UNPAIRED_PREFERENCE: {
        "prompt": "string", "history": "turns", "completion": "string", "label": "bool", "interaction_id": "string",
    },
}  # fmt: skip
"""The columns of each dataset type and their types."""

_DATA_FILE = "data-00000-of-00001.arrow"
_BATCH_ROWS = 10_000
PROVENANCE_COLUMNS = ("source", "provenance", "interaction_id", "split")


@dataclass(frozen=True)
class DatasetExample:
    """One example of prompt_completion/.

    Attributes:
        reward: -1 to 1; the weight of the example where training is weighted by reward.
        source: the name of the declared source, or `logs`, `ingested` or `replay`.
        provenance: where in the source: a path and line, a key.
        history: the turns before the prompt.
        content_hash: the hash by which the store recognizes the example again after it was judged.
        author: `author_hash` of who wrote the prompt.
        domain, kind, created_at: of the interaction.
    """

    prompt: str
    completion: str
    reward: float
    source: str
    provenance: str | None = None
    interaction_id: str | None = None
    history: tuple[Turn, ...] = ()
    content_hash: str | None = None
    author: str | None = None
    domain: str | None = None
    kind: str | None = None
    created_at: datetime | None = None

    @property
    def conversation(self) -> str:
        """The prompt with the turns before it."""
        return conversation_text(self.prompt, self.history)


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset was built from and what was left out.

    Attributes:
        rows: dataset type -> split -> rows, without replay; of unpaired preference the undesirable ones.
        replayed: replay examples, which stand at the end of train.
        sources: source -> examples of train and validation, replay included.
        implicit: those of them whose answer nobody objected to, and nobody approved.
        left_out: reason -> examples that are not in train or validation.
        redacted: kind of secret or personal data -> replacements in the examples.
        near_benchmark: ids of interactions that overlap with the benchmark.
        conflicts: ids of a kept interaction and of one with another answer to the same prompt, the first ones.
        sample: the first examples of each source, replay last.
    """

    rows: dict[str, dict[str, int]]
    replayed: int
    sources: dict[str, int]
    implicit: int
    left_out: dict[str, int]
    redacted: dict[str, int]
    near_benchmark: tuple[str, ...]
    conflicts: tuple[tuple[str, str], ...]
    sample: tuple[DatasetExample, ...]


# --- Writing ----------------------------------------------------------------------------------------------------------


class DatasetWriter:
    """Writes a DatasetDict one table at a time; the files depend on the rows only, not on how tables divide them."""

    def __init__(self, folder: Path, columns: Mapping[str, str]) -> None:
        """Open a file for each split.

        Args:
            folder: the dataset's folder; must not exist yet.
            columns: column -> string, float64, bool, time, or turns (a conversation).
        """
        import pyarrow as pa

        own = {
            "turns": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "time": pa.timestamp("us", tz="UTC"),
        }
        self.schema = pa.schema({name: own.get(kind) or pa.type_for_alias(kind) for name, kind in columns.items()})
        self._folder = folder
        for split in SPLITS:
            (folder / split).mkdir(parents=True)
        self._writers = {split: pa.ipc.new_stream(folder / split / _DATA_FILE, self.schema) for split in SPLITS}
        self._pending = dict.fromkeys(SPLITS, self.schema.empty_table())

    def write(self, split: str, rows: Any) -> None:
        """Add a table of rows to a split."""
        import pyarrow as pa

        rows = pa.concat_tables([self._pending[split], rows.cast(self.schema)])
        full = rows.num_rows - rows.num_rows % _BATCH_ROWS
        self._write_batches(split, rows.slice(0, full))
        self._pending[split] = rows.slice(full)

    def _write_batches(self, split: str, rows: Any) -> None:
        import pyarrow as pa

        for start in range(0, rows.num_rows, _BATCH_ROWS):
            # `take` copies: a slice would be written together with the rest of its buffer.
            batch = rows.take(pa.array(range(start, min(start + _BATCH_ROWS, rows.num_rows))))
            self._writers[split].write_table(batch.combine_chunks())

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split, writer in self._writers.items():
            if error is None:
                self._write_batches(split, self._pending[split])
            writer.close()
        if error is not None:
            return  # without the JSON files it is no dataset
        for split in self._writers:
            folder = self._folder / split
            state: dict[str, Any] = {
                "_data_files": [{"filename": _DATA_FILE}],
                "_fingerprint": hash_file(folder / _DATA_FILE)[:16],  # the key of the library's own cache
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
            write_text(folder / "dataset_info.json", "{}\n")  # the types of the columns stand in the data files
        splits = {"splits": list(self._writers)}
        write_text(self._folder / "dataset_dict.json", json.dumps(splits, indent=2) + "\n")


# --- Reading ----------------------------------------------------------------------------------------------------------


def type_folder(dataset: Path, dataset_type: str) -> Path:
    """Return the folder of one dataset type.

    Raises:
        CurationError: the dataset does not have it, as an earlier version of the project wrote it.
    """
    folder = dataset / dataset_type
    if not folder.is_dir():
        raise CurationError(
            f"The dataset {dataset} has no folder {dataset_type}/: an earlier version of this project wrote it. "
            "`finetune run` builds the dataset again"
        )
    return folder


def read_split(
    dataset: Path, dataset_type: str, split: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, with one record batch in memory at a time.

    Args:
        columns: the columns to read; None for all.

    Raises:
        CurationError: an earlier version of the project wrote the dataset.
    """
    import pyarrow as pa

    path = type_folder(dataset, dataset_type) / split / _DATA_FILE
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        for batch in batches:
            yield from (batch if columns is None else batch.select(columns)).to_pylist()


def read_examples(dataset: Path, split: str) -> Iterator[DatasetExample]:
    """Yield the examples of prompt_completion/, one record batch in memory at a time."""
    for row in read_split(dataset, PROMPT_COMPLETION, split):
        yield DatasetExample(**{**row, "history": turns_of(row)})


def check_columns(dataset: Path) -> None:
    """Check that prompt_completion/ has the columns that describe interactions.

    Raises:
        CurationError: an earlier version of the project wrote the dataset.
    """
    import pyarrow as pa

    path = type_folder(dataset, PROMPT_COMPLETION) / "train" / _DATA_FILE
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        missing = [name for name in ("author", "domain", "kind", "created_at") if name not in batches.schema.names]
    if missing:
        raise CurationError(
            f"The dataset {dataset.name} has no columns {', '.join(missing)}: an earlier version of this project wrote "
            "it. `finetune run` builds the dataset again"
        )


def author_hash(user: str) -> str:
    """Return what stands for a user in a dataset, which has no names: the first 16 digits of the name's SHA-256."""
    return text_hash(user)[:16]


def read_all(dataset: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield every row of a dataset: of all three types and of both splits."""
    for dataset_type in COLUMNS:
        for split in SPLITS:
            yield from read_split(dataset, dataset_type, split, columns)


def turns_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns before the prompt of a row."""
    return tuple(Turn.model_validate(turn) for turn in row["history"])
