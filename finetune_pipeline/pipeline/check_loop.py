"""Check what a loop's settings name before a run starts: files, folders, environment variables, training, base model.

`finetune run` and `finetune check` call it, so that one message lists all problems.
"""

import os
from collections.abc import Callable, Iterator

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.evaluation.benchmark import BenchmarkError, load_benchmark
from finetune_pipeline.export.base import CONFIG_FILES, resolve_base_model
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.ray_session import ClusterError, check_installed
from finetune_pipeline.schemas import SchemaError
from finetune_pipeline.settings import (
    CodeSource,
    DocumentsSource,
    FilesSource,
    LoopSettings,
    SettingsError,
    SqlSource,
    VaultSource,
    project_path,
)
from finetune_pipeline.sources.ingest_reader import event_files
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.job import TrainingError

_EXPECTED = (
    BenchmarkError, ClusterError, CurationError, ExportError, SchemaError, SettingsError, SourceError, TrainingError,
)  # fmt: skip


def check_loop(loop: LoopSettings, *, download: bool = True) -> list[str]:
    """Return the problems that would make a run fail, in the order of the settings; empty if there are none.

    Each names the file with its line, or the setting, and what to change.

    Args:
        download: download the weights of a base model of Hugging Face if there is no other problem; they are not
            checked otherwise. Its configuration is read in any case.
    """
    problems = [
        *_files(loop),
        *_sources(loop),
        *_problems(lambda: reward_function(loop.feedback)),
        *_training(loop),
    ]
    if project_path(loop.base_model).is_dir() or (download and not problems):
        problems += _base_model(loop)
    return list(dict.fromkeys(problems))


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except _EXPECTED as error:
        return str(error).splitlines()  # a benchmark's error has a line for each of its problems
    return []


def _files(loop: LoopSettings) -> Iterator[str]:
    """Yield what is wrong with the output schema, the benchmark, the compliance rules and the replay examples."""
    without_schema = _problems(lambda: loop_files.output_schema(loop))
    yield from without_schema
    yield from _problems(
        lambda: load_benchmark(
            project_path(loop.evaluation.benchmark), None if without_schema else loop_files.output_schema(loop)
        )
    )
    yield from _problems(lambda: loop_files.rules(loop))
    yield from _problems(lambda: loop_files.replay(loop))


def _sources(loop: LoopSettings) -> Iterator[str]:
    """Yield which folders, files, variables and teachers' keys of the sources are missing."""
    for folder in loop.log_folders[:-1]:  # the last one is the drop folder, which ingestion creates
        yield from _problems(lambda folder=folder: event_files(folder))  # type: ignore[misc]
    for index, source in enumerate(loop.sources):
        here = f"sources[{index}] ({source.name})"
        if isinstance(source, FilesSource | VaultSource | CodeSource | DocumentsSource):
            named = {"path": source.path}
            if isinstance(source, DocumentsSource):
                named["templates"] = source.templates
            for setting, text in named.items():
                path = project_path(text)
                if not path.exists():
                    yield f"{here}: {path} does not exist; create it, or correct {setting}"
                elif not path.is_dir() and not isinstance(source, FilesSource):
                    yield f"{here}: {path} is not a folder; correct {setting}"
        elif isinstance(source, SqlSource) and not os.environ.get(source.url_env):
            yield (
                f"{here}: the environment variable {source.url_env} is not set; export the database's URL in it, or "
                "correct url_env"
            )
        teacher = source.teacher if isinstance(source, CodeSource | DocumentsSource) else None
        if teacher and teacher.api_key_env and not os.environ.get(teacher.api_key_env, "").strip():
            yield (
                f"{here}: the environment variable {teacher.api_key_env} is not set; export the teacher's key for "
                f"{teacher.url} in it, or correct teacher.api_key_env"
            )


def _training(loop: LoopSettings) -> Iterator[str]:
    """Yield what is wrong with the training settings. Of the base model, only the configuration is read."""
    from finetune_pipeline.training.backends import choose_backend
    from finetune_pipeline.training.base_model import check_trained_tokens
    from finetune_pipeline.training.distributed import split_batch
    from finetune_pipeline.training.preference import check_micro_batch
    from finetune_pipeline.training.presets import apply_preset
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
            settings = apply_preset(settings, architecture_of(loop.base_model))
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
