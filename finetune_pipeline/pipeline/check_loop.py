"""Check what a loop's settings name before a run starts: files, folders, environment variables, training, base model.

`finetune run` and `finetune check` call it, so that one message lists all problems.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

import sqlalchemy as sa

from finetune_pipeline.alerts import receivers
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import BenchmarkError, load_benchmark
from finetune_pipeline.evaluation.gate import benchmark_capacity
from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.export.base import CONFIG_FILES, dequantized_base, resolve_base_model
from finetune_pipeline.export.base_check import check_vocabulary
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import new_examples
from finetune_pipeline.manifests import TOKENIZER_FILES
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.row_settings import too_long
from finetune_pipeline.pipeline.source_events import without_own_system_prompt
from finetune_pipeline.pipeline.source_preview import why_unusable
from finetune_pipeline.pipeline.source_sync import limited, reader_for
from finetune_pipeline.ray_session import ClusterError, check_installed
from finetune_pipeline.records import Example, Turn
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.settings import (
    CodeSource,
    DocumentsSource,
    FilesSource,
    LoopSettings,
    ServerTarget,
    SettingsError,
    Source,
    SqlSource,
    VaultSource,
    database_url,
    loop_file,
    project_path,
)
from finetune_pipeline.sources.files import EXAMPLE_ROW, has_rows
from finetune_pipeline.sources.ingest_reader import event_files
from finetune_pipeline.sources.source_record import SourceError, SourceRecord
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.presets import apply_preset
from finetune_pipeline.yaml_files import line_of

_EXPECTED = (
    BenchmarkError, ClusterError, CurationError, ExportError, MetricError, SchemaError, SettingsError, SourceError,
    TrainingError,
)  # fmt: skip
_LOCAL = (FilesSource, VaultSource, CodeSource, DocumentsSource)
_PROMPTS = 20  # of the benchmark, whose tokens are compared
_EXAMPLES = 200  # whose roles and lengths are looked at
_CONTENT = "message"
_FULL_ATTENTION = ("mistral", "phi3", "qwen2", "qwen3")
"""Architectures (`model_type`) with a sliding window in transformers and none in llama.cpp."""


def check_loop(loop: LoopSettings, *, download: bool = True) -> list[str]:
    """Return the problems that would make a run fail, in the order of the settings; empty if there are none.

    Each names the file with its line, or the setting, and what to change, and has the setting's line in the loop's
    YAML. The lengths of examples are compared with `max_length` if there is no other problem.

    Args:
        download: download the weights of a base model of Hugging Face if there is no other problem; they are not
            checked otherwise. Its configuration and tokenizer are read in any case.
    """
    no_model = _problems(lambda: resolve_base_model(loop.base_model, CONFIG_FILES))
    problems = [
        *_files(loop),
        *_sources(loop),
        *_at("feedback.reward_function", _problems(lambda: reward_function(loop.feedback))),
        *_at("training", (problem for problem in _training(loop) if problem not in no_model)),
        *_at("base_model", no_model),
    ]
    if not no_model and (project_path(loop.base_model).exists() or (download and not problems)):
        no_model = _base_model(loop)
        problems += _at("base_model", no_model)
    if not no_model:
        problems += _at("base_model", _vocabulary(loop, lengths=not problems))
    return _with_lines(loop, list(dict.fromkeys(problems)))


def benchmark_note(loop: LoopSettings) -> str:
    """Return what the benchmark can decide, and how many questions it needs if that is nothing.

    Raises:
        BenchmarkError: it cannot be used.
    """
    questions = loop_files.benchmark(loop).questions
    units = {question.cluster or index for index, question in enumerate(questions)}
    return f"evaluation.benchmark: {benchmark_capacity(len(questions), len(units), loop.gate)}"


def unset_variables(loop: LoopSettings) -> list[str]:
    """Return the environment variables of alerts and deployment targets that are not set; a run goes on without them.

    Each has the setting's line in the loop's YAML.
    """
    named = [
        (f"alerts.{receiver}_env", variable, f"alerts are not sent to the {receiver}; export its URL")
        for receiver, variable in receivers(loop.alerts).items()
    ]
    for index, target in enumerate(loop.deploy.targets):
        if isinstance(target, ServerTarget) and target.api_key_env:
            effect = f"the target {target.key} cannot be reached; export the API key of {target.url}"
            named.append((f"deploy.targets[{index}].api_key_env", target.api_key_env, effect))
    unset = [
        (setting, f"{setting}: the environment variable {variable} is not set here, so {effect} in it")
        for setting, variable, effect in named
        if not os.environ.get(variable, "").strip()
    ]
    return _with_lines(loop, unset)


def _at(setting: str, problems: Iterable[str]) -> list[tuple[str, str]]:
    """Return problems with the path of the setting that they are about."""
    return [(setting, problem) for problem in problems]


def _with_lines(loop: LoopSettings, problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return the texts of problems, with the line in the loop's YAML, if a file declares the loop."""
    path = loop_file(loop.name) if problems else None
    if path is None:
        return [problem for _, problem in problems]
    text = path.read_text(encoding="utf-8")
    lines = [line_of(text, f"attributes.{setting}") for setting, _ in problems]
    return [f"{problem} ({path}, line {line})" for (_, problem), line in zip(problems, lines, strict=True)]


def _vocabulary(loop: LoopSettings, *, lengths: bool) -> list[str]:
    """Return what is wrong with the base model's tokenizer and chat template, or else with the examples' lengths."""
    try:
        folder = resolve_base_model(loop.base_model, (*CONFIG_FILES, *TOKENIZER_FILES))
        problems = vocabulary_problems(folder, loop) or sliding_window_problems(folder, loop)
        return problems or (_lengths(folder, loop) if lengths else [])
    except ExportError as error:
        return str(error).split("\n")[:1]  # the other lines are the output of a process


def vocabulary_problems(base: Path, loop: LoopSettings | None) -> list[str]:
    """Return what is wrong with the tokenizer and chat template of a base model, see `check_vocabulary`.

    Args:
        base: the folder of the base model.
        loop: whose system prompt, benchmark, data and output schema are used; None for a base model without a loop.

    Raises:
        ExportError: the base model cannot be checked.
    """
    if loop is None:
        return check_vocabulary(base, "")
    prompts, schema = [], None
    with suppress(*_EXPECTED):  # of the files, which `check_loop` reports
        prompts = [question.prompt for question in loop_files.benchmark(loop).questions[:_PROMPTS]]
    with suppress(*_EXPECTED):
        schema = loop_files.constraint(loop)
    roles = sorted({tuple(turn.role for turn in example.history) for example in _stored(loop)})
    histories = [[Turn(role=role, content=_CONTENT) for role in one] for one in roles]
    return check_vocabulary(base, loop.system_prompt, prompts, histories, schema)


def sliding_window_problems(folder: Path, loop: LoopSettings) -> list[str]:
    """Return which lengths exceed a sliding window that training applies and llama.cpp does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, window = config.get("model_type"), config.get("sliding_window")
    applied = kind in _FULL_ATTENTION and config.get("use_sliding_window", not kind.startswith("qwen"))
    if not applied or not isinstance(window, int):
        return []
    lengths = {
        "training.max_length": loop.training.max_length,
        "evaluation.context": loop.evaluation.context,
        "serving.context": loop.context,
    }
    longest = max(lengths.values())
    if longest <= window:
        return []
    named = ", ".join(f"{name} ({length:,})" for name, length in lengths.items() if length > window)
    return [
        f"each token of {folder} attends to the last {window:,} tokens in training (sliding_window of its "
        f"config.json), but to all of them in llama.cpp, which has no sliding window for {kind}: the model would serve "
        f"otherwise than it was trained. Set {named} to at most {window:,}"
    ]


def _lengths(folder: Path, loop: LoopSettings) -> list[str]:
    """Return what is wrong with `max_length`, by the first examples of the store and the local sources.

    Args:
        folder: of the base model's configuration and tokenizer, without problems.
    """
    settings = loop.training
    if settings.preset is not None:
        settings = apply_preset(settings, architecture_of(dequantized_base(loop.base_model)))
    stored = (SourceRecord("", one.prompt, one.target, one.history) for one in _stored(loop))
    records = list(islice(chain(stored, _given(loop)), _EXAMPLES))
    return list(filter(None, [too_long(records, folder, loop.system_prompt, settings.max_length)]))


def _given(loop: LoopSettings) -> Iterator[SourceRecord]:
    """Yield the records of the local sources that need no teacher."""
    for source in loop.sources:
        if isinstance(source, _LOCAL) and getattr(source, "teacher", None) is None:
            with suppress(SourceError):  # a problem after the first record, which a sync reports
                for one in limited(reader_for(source, loop.curation.redaction)(source, None), source):
                    if isinstance(one, SourceRecord):
                        yield without_own_system_prompt(one, loop)


def _stored(loop: LoopSettings) -> Iterator[Example]:
    """Yield the loop's first new examples, as far as they are stored."""
    url = sa.make_url(database_url())
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return  # a check creates no database
    with connect().read() as connection:
        yield from islice(new_examples(connection, loop.name, 0, loop.curation.min_reward), _EXAMPLES)


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except _EXPECTED as error:
        return str(error).split("\n")  # a benchmark's error has a line for each of its problems
    return []


def _files(loop: LoopSettings) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with schema, benchmark, compliance rules, metrics and replay examples."""
    without_schema = _problems(lambda: loop_files.output_schema(loop))
    yield from _at("output_schema", without_schema or _problems(lambda: loop_files.constraint(loop)))
    without_benchmark = _problems(
        lambda: load_benchmark(
            project_path(loop.evaluation.benchmark), None if without_schema else loop_files.output_schema(loop)
        )
    )
    yield from _at("evaluation.benchmark", without_benchmark)
    without_rules = _problems(lambda: loop_files.rules(loop))
    yield from _at("evaluation.compliance", without_rules)
    if not (without_schema or without_benchmark or without_rules):
        yield from _at("evaluation", _problems(lambda: loop_files.scorer(loop)))
        yield from _at("evaluation.sealed_benchmark", _problems(lambda: loop_files.sealed_benchmark(loop)))
    yield from _at("curation.replay", _problems(lambda: loop_files.replay(loop)))


def _sources(loop: LoopSettings) -> Iterator[tuple[str, str]]:
    """Yield which folders, files, variables and teachers' keys of the sources are missing, and what gives no record."""
    for index, folder in enumerate(loop.log_folders[:-1]):  # the last one is the drop folder, which ingestion creates
        missing = _problems(lambda folder=folder: event_files(folder))  # type: ignore[misc]
        yield from _at(f"ingest.folders[{index}]", missing)
    for index, source in enumerate(loop.sources):
        problems = list(_missing(source))
        # Without its teacher, a source may give nothing. A check of a database could take minutes there.
        if not problems and isinstance(source, _LOCAL) and getattr(source, "teacher", None) is None:
            problems = list(filter(None, [why_unusable(loop, source)]))
        yield from _at(f"sources[{index}]", (f"sources[{index}] ({source.name}): {problem}" for problem in problems))


def _missing(source: Source) -> Iterator[str]:
    if isinstance(source, _LOCAL):
        named = {"path": source.path}
        if isinstance(source, DocumentsSource):
            named["templates"] = source.templates
        for setting, text in named.items():
            path = project_path(text)
            if not path.exists():
                yield f"{path} does not exist; create it, or correct {setting}"
            elif not path.is_dir() and not isinstance(source, FilesSource):
                yield f"{path} is not a folder; correct {setting}"
            elif isinstance(source, FilesSource) and not has_rows(path):
                yield (
                    f"{path} has no rows; write one on each line of a .jsonl file, such as {json.dumps(EXAMPLE_ROW)}, "
                    "or remove the source if the loop learns from logs alone"
                )
    elif isinstance(source, SqlSource) and not os.environ.get(source.url_env):
        yield (
            f"the environment variable {source.url_env} is not set; export the database's URL in it, or correct url_env"
        )
    teacher = source.teacher if isinstance(source, CodeSource | DocumentsSource) else None
    if teacher and teacher.api_key_env and not os.environ.get(teacher.api_key_env, "").strip():
        yield (
            f"the environment variable {teacher.api_key_env} is not set; export the teacher's key for {teacher.url} in "
            "it, or correct teacher.api_key_env"
        )


def _training(loop: LoopSettings) -> Iterator[str]:
    """Yield what is wrong with the training settings. Of the base model, only the configuration is read."""
    from finetune_pipeline.training.backends import choose_backend
    from finetune_pipeline.training.base_model import check_trained_tokens
    from finetune_pipeline.training.distributed import split_batch
    from finetune_pipeline.training.preference import check_micro_batch
    from finetune_pipeline.training.trackers import check_trackers

    settings = loop.training
    if settings.compute == "ray":
        yield from _problems(lambda: check_installed("training.compute"))
    if loop.curation.compute == "ray":
        yield from _problems(lambda: check_installed("curation.compute"))
    yield from _problems(lambda: check_trackers(settings))
    no_model = _problems(lambda: resolve_base_model(loop.base_model, CONFIG_FILES))
    yield from no_model
    if no_model:
        return
    if settings.preset is not None:
        try:
            settings = apply_preset(settings, architecture_of(dequantized_base(loop.base_model)))
        except _EXPECTED as error:
            yield str(error)
            return  # the checks below are of the settings that the preset fills
    yield from _problems(lambda: choose_backend(settings)[0].validate(settings))
    yield from _problems(
        lambda: check_micro_batch(settings, split_batch(settings, settings.num_processes).per_device_train_batch_size)
    )
    yield from _problems(lambda: check_trained_tokens(resolve_base_model(loop.base_model, CONFIG_FILES), settings))


def _base_model(loop: LoopSettings) -> list[str]:
    """Return what is missing in the folder of the base model, whose weights are downloaded first if it is an id."""
    from finetune_pipeline.training.base_model import check_base_model

    return _problems(lambda: check_base_model(resolve_base_model(loop.base_model)))
