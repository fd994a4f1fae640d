"""The files of a new loop: `defs.yaml` with comments, README. `finetune init` and `dg scaffold` write the same ones."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune_pipeline.evaluation.benchmark import EXAMPLE_QUESTION
from finetune_pipeline.settings import (
    COMPONENT_TYPE,
    PROJECT_ROOT,
    GateSettings,
    LoopSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    TriggerSettings,
)
from finetune_pipeline.sources.files import EXAMPLE_ROW

DEFS, README, BENCHMARK, ROWS, SCHEMA = (
    "defs.yaml", "README.md", "benchmark.jsonl", "data/rows.jsonl", "answer.schema.json",
)  # fmt: skip

DEFAULT_BASE = "Qwen/Qwen2.5-0.5B-Instruct"

_EDITOR_SCHEMA = PROJECT_ROOT / "finetune_pipeline" / "defs.schema.json"
_COMMENT_COLUMN = 44


@dataclass(frozen=True)
class Setting:
    """A setting with the comment behind it."""

    value: Any
    comment: str = ""


@dataclass(frozen=True)
class NewLoop:
    """What the files of a new loop say.

    Attributes:
        base_model: as in the YAML.
        metric: `evaluation.metric`.
        system_prompt: empty if there is none.
        has_schema: answers are JSON of `answer.schema.json`.
        training, evaluation: further settings of these sections; what is not there has its default.
        row, question: examples for the README.
        root: prefix of the paths in the YAML; empty where they are relative to the loop's folder.
    """

    name: str
    base_model: str
    metric: Setting = Setting("rouge1", "ROUGE-1 recall of free text; exact for labels; parameters for JSON")
    system_prompt: str = ""
    has_schema: bool = False
    training: Mapping[str, Setting] = field(default_factory=dict)
    evaluation: Mapping[str, Setting] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=lambda: EXAMPLE_ROW)
    question: Mapping[str, Any] = field(default_factory=lambda: EXAMPLE_QUESTION)
    root: str = ""


def check_name(name: str) -> None:
    """Raise SettingsError unless a loop can have this name; the message suggests one."""
    try:
        LoopSettings.model_validate(
            {"name": name, "base_model": "m", "evaluation": {"benchmark": "b", "metric": "exact"}}
        )
    except ValidationError:
        ascii_only = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
        suggested = re.sub(r"[^a-z0-9]+", "_", ascii_only).strip("_")[:60]
        if not suggested[:1].isalpha():
            suggested = f"loop_{suggested}".strip("_")[:60] if suggested else "my_loop"
        raise SettingsError(
            f"no loop can be named {name!r}: a name has lower-case letters a to z, digits and underscores, starts with "
            f"a letter, and has at most 60 characters; {suggested} would do"
        ) from None


def files_of(loop: NewLoop, folder: Path) -> dict[str, str]:
    """Return the files of a loop without data: name -> text.

    Args:
        folder: where the loop's folder will be.
    """
    return {DEFS: defs_text(loop, folder), README: readme_text(loop), BENCHMARK: "", ROWS: ""}


# --- defs.yaml --------------------------------------------------------------------------------------------------------


def defs_text(loop: NewLoop, folder: Path) -> str:
    """Return the text of `defs.yaml`. Settings that have their default are comments, so that defaults may improve."""
    where = "this file's folder" if not loop.root else "the project"
    return "\n".join(
        [
            f"# yaml-language-server: $schema={Path(os.path.relpath(_EDITOR_SCHEMA, folder)).as_posix()}",
            f"# Paths are relative to {where}. A setting that is not here has its default;",
            "# docs/reference/settings.md of finetune-pipeline describes each. A line that begins with # is",
            "# a suggestion: remove the # to set it.",
            f"type: {COMPONENT_TYPE}",
            "",
            "attributes:",
            *_lines(loop),
            "",
        ]
    )


def _lines(loop: NewLoop) -> Iterator[str]:
    yield _line("name", Setting(loop.name))
    yield _line("description", Setting("What the model of this loop does, in one sentence."))
    yield ""
    yield _line("base_model", Setting(loop.base_model, "a Hugging Face id, or a folder with safetensors"))
    system = Setting(loop.system_prompt or "You answer in one word.", "system message of every prompt")
    yield _line("system_prompt", system, is_set=bool(loop.system_prompt))
    schema = Setting(loop.root + SCHEMA, "JSON Schema of the answers, if they are JSON")
    yield _line("output_schema", schema, is_set=loop.has_schema)
    yield ""
    yield "  sources:"
    yield _line("- kind", Setting("files", "JSON lines, JSON, CSV, Parquet: docs/how-to/sources.md"), level=2)
    yield _line("name", Setting("rows"), level=3)
    yield _line("path", Setting(f"{loop.root}data", "a file, or a folder of files; add more of them there"), level=3)
    yield ""
    rate = {"learning_rate": _default(TrainingSettings, "learning_rate", "the default")}
    epochs = {"num_train_epochs": _default(TrainingSettings, "num_train_epochs", "passes over the data; the default")}
    yield from _section("training", loop.training, {**rate, **epochs})
    yield ""
    files = {"benchmark": Setting(loop.root + BENCHMARK, "at least 40 questions, which never train")}
    yield from _section("evaluation", {**files, "metric": loop.metric, **loop.evaluation}, {})
    yield ""
    gain = _default(GateSettings, "min_gain", "the default: a challenger must be 5% better than the champion")
    yield from _section("gate", {}, {"min_gain": gain})
    yield ""
    examples = _default(TriggerSettings, "new_examples", "the default: good new examples that start a run")
    running = _default(TriggerSettings, "running", "the default; true switches sensor and schedules on")
    yield from _section("trigger", {}, {"new_examples": examples, "running": running})


def _section(name: str, given: Mapping[str, Setting], suggested: Mapping[str, Setting]) -> Iterator[str]:
    """Yield a section. What is only suggested is a comment, and so is the section's head if nothing is given."""
    yield f"  {name}:" if given else f"  # {name}:"
    for key, setting in given.items():
        yield _line(key, setting, level=2)
    for key, setting in suggested.items():
        if key not in given:
            yield _line(key, setting, level=2, is_set=False)


def _line(key: str, setting: Setting, *, level: int = 1, is_set: bool = True) -> str:
    text = f"{'  ' * level if is_set else '  # ' + '  ' * (level - 1)}{key}: {_scalar(setting.value)}"
    return f"{text.ljust(_COMMENT_COLUMN - 1)} # {setting.comment}" if setting.comment else text


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float) and 0 < value < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"  # YAML 1.1 reads 2e-04 as a text
    breaks = isinstance(value, str) and not {*value}.isdisjoint("\x85\u2028\u2029")  # YAML 1.1 reads them as line ends
    options: dict[str, Any] = {"allow_unicode": not breaks, "width": float("inf")}
    plain: str = yaml.safe_dump(value, **options).removesuffix("...\n").rstrip("\n")
    if "\n" in plain:
        plain = yaml.safe_dump(value, **options, default_style='"').rstrip("\n")
    return plain


def _default(section: type[Settings], name: str, comment: str) -> Setting:
    return Setting(section.model_fields[name].default, comment)


# --- README -----------------------------------------------------------------------------------------------------------


def readme_text(loop: NewLoop) -> str:
    """Return the text of the loop's README."""
    question = json.dumps(loop.question, ensure_ascii=False)
    row = json.dumps(loop.row, ensure_ascii=False)
    schema = _README_SCHEMA if loop.has_schema else ""
    answers = _README_TEXT if not loop.has_schema else _README_JSON
    return _README.format(
        name=loop.name,
        metric=loop.metric.value,
        schema=schema,
        row=row,
        question=question,
        answers=answers,
        export="" if loop.root else _EXPORT,
    )


_README_JSON = """\
`completion` is the JSON as a text, `expected` the object itself."""

_README_TEXT = f"""\
If your answers are JSON, write their JSON Schema to `{SCHEMA}`, and set `output_schema` and
`metric: parameters` in `defs.yaml`. `completion` is the JSON as a text, `expected` the object
itself."""

_README_SCHEMA = f"""\
- `{SCHEMA}`: the JSON Schema of the answers. Answers that do not pass it do not train, and the
  model can give no others. It was inferred from the rows: widen it where the task allows more than
  they show.
"""

_EXPORT = """\
    export FINETUNE_LOOPS_DIR=...        # the folder that this folder is in
"""

_README = """\
# {name}

A fine-tuning loop of finetune-pipeline.

- `defs.yaml`: the settings. Say in `description` what the model does.
- `data/`: rows to train on. Add rows to `rows.jsonl`, or files beside it.
- `benchmark.jsonl`: questions with the expected answers, by which models are compared
  (metric: {metric}). They never train, nor do their near-duplicates. Do not change them between
  runs: a changed benchmark is another one.
{schema}
## Rows and questions

A line of `data/rows.jsonl` is a prompt and the answer that the model should give. `reward` (-1 to
1), `correction`, `history` and `user` are optional.

    {row}

A line of `benchmark.jsonl` is a question. Results are also counted by `slice`.

    {question}

{answers}

## Run

{export}    finetune check                       # lists what is missing or wrong; runs nothing
    finetune run                         # trains, compares, and promotes the model if it is better
    finetune ask "..." --compare         # the new model beside the base model

With several loops in that folder, commands need `--loop {name}`, or `FINETUNE_LOOP={name}`.

## Before you trust the result

- Read some questions of the benchmark and their expected answers. A wrong one costs every model.
- At least 40 questions, or one lucky answer decides. Each slice should have several.
- The questions should look like the prompts that users will send, not only like the rows.
- Look at the report that `finetune run` names: which answers are wrong, and how?

## Feedback

Applications ask the model through `finetune serve`, and log answers and feedback there or with
`finetune_pipeline.feedback.FeedbackClient`. Corrections and approved answers train with the rows in
the next run. By hand:

    finetune ask "a prompt"                                         # records it, with its answer
    finetune feedback correct "a prompt" "the right answer" --user me
"""
