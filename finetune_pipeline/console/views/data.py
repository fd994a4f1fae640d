"""Data: dataset versions with a sample and an export, uploaded files with named errors, and declared sources."""

from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta

import streamlit as st

from finetune_pipeline.artifacts import Artifact
from finetune_pipeline.console import parts, session
from finetune_pipeline.curation.dataset_files import SPLITS
from finetune_pipeline.curation.export_formats import WRITERS, export_rows
from finetune_pipeline.feedback.source_state import active_sources, skipped_records
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline.dataset_export import (
    ExampleFilter,
    ExampleSummary,
    examples_of,
    list_datasets,
    summarize_examples,
)
from finetune_pipeline.pipeline.datasets import SOURCE, FilePreview, Method, dataset_from_file, preview_file
from finetune_pipeline.pipeline.source_preview import preview_source
from finetune_pipeline.pipeline.uploaded_files import new_file
from finetune_pipeline.wording import counted

SAMPLE = 20
PREVIEWED = 10
_SKIPPED = 100
_FILTERS = {"source": "Source", "domain": "Domain", "kind": "Kind"}
_PIECE = 2**20


def show() -> None:
    """Show the page."""
    parts.heading("Data", "What trains: dataset versions, files that you upload, and declared sources.")
    versions, upload, sources = st.tabs(["Dataset versions", "Upload", "Sources"])
    with versions:
        _versions()
    with upload:
        _upload()
    with sources:
        _sources()


def _versions() -> None:
    found = list_datasets(session.loop())
    if not found:
        parts.empty(
            "No dataset was built yet.",
            "Start a training, which builds one from the logs, or upload a file of examples.",
        )
        return
    parts.table(
        [
            {
                "dataset": one.manifest.version,
                "built": session.moment(one.manifest.created_at),
                "from": "upload" if SOURCE in one.manifest.settings else "logs and sources",
                "train": one.manifest.train,
                "validation": one.manifest.validation,
                "replayed": one.manifest.replayed,
                "left out": sum(one.manifest.left_out.values()),
                "redacted": sum(one.manifest.redacted.values()),
            }
            for one in found
        ]
    )
    names = {one.manifest.version: one for one in found}
    dataset = names[st.selectbox("Dataset", list(names))]
    left, right = st.columns(2)
    with left:
        st.caption("examples by source")
        parts.table([{"source": name, "examples": count} for name, count in dataset.manifest.sources.items()])
    with right:
        st.caption("left out, and why")
        parts.table(_counts(dataset.manifest.left_out) or [{"reason": "nothing was left out", "examples": 0}])
    _sample_and_export(dataset)


def _counts(reasons: dict[str, int]) -> list[dict[str, object]]:
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    return [{"reason": reason, "examples": count} for reason, count in ordered if count]


def _summarize(_dataset: Artifact[DatasetManifest], loop: str, version: str, split: str, filter: str) -> ExampleSummary:
    return summarize_examples(_dataset, split, ExampleFilter.model_validate_json(filter), SAMPLE)


_summarized = st.cache_data(_summarize, max_entries=64, show_spinner="Reading the examples")


def _sample_and_export(dataset: Artifact[DatasetManifest]) -> None:
    loop, version = session.loop(), dataset.manifest.version
    st.subheader("Sample and export")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        split = st.selectbox("Split", SPLITS, width=140)
        # A dataset never changes, so what it holds is counted once.
        values = _summarized(dataset, loop.name, version, split, ExampleFilter().model_dump_json()).values
        chosen = {name: _values(label, values[name]) for name, label in _FILTERS.items() if len(values[name]) > 1}
        author = ""
        if values["author"]:
            author = st.text_input(
                "Author", width=160, help=f"A name as logged; a dataset holds {len(values['author']):,} only as hashes."
            )
        reward = st.number_input("Lowest reward", -1.0, 1.0, -1.0, 0.1, width=140)
        since = st.date_input("Logged since", None, width=160)
        until = st.date_input("Logged until", None, width=160)
        format = st.selectbox("Format", list(WRITERS), width=180)
    wanted = ExampleFilter(
        author=(author.strip(),) if author.strip() else (),
        min_reward=reward if reward > -1 else None,
        since=datetime.combine(since, time(), UTC) if since else None,
        until=datetime.combine(until, time(), UTC) + timedelta(days=1) if until else None,  # the day with all its hours
        **{name: tuple(selected) for name, selected in chosen.items()},
    )
    found = _summarized(dataset, loop.name, version, split, wanted.model_dump_json())
    st.caption(f"{counted(found.count, 'example')} pass the filter.")
    if not found.count:
        parts.empty("No example passes the filter.", "Widen it, or choose the other split.")
        return
    parts.table(
        [
            {
                "prompt": one.prompt[:300],
                "completion": one.completion[:300],
                "reward": f"{one.reward:+.2f}",
                "source": one.source,
            }
            for one in found.sample
        ],
        column_config={"prompt": {"width": 320}, "completion": {"width": 320}},
    )
    name = f"{loop.name}-{version}-{split}.{format}.jsonl"
    prompt = str(dataset.manifest.settings.get("system_prompt", loop.system_prompt))
    # An export is an action with a row in the audit log, so it is written when the button is pressed.
    if session.user().may("admin") and st.button("Prepare the export", icon=":material/archive:"):
        text = session.perform(
            "dataset export",
            version,
            lambda: "".join(f"{row}\n" for row in export_rows(examples_of(dataset, split, wanted), format, prompt)),
            needs="admin",
        )
        if text is not None:
            st.download_button(f"Download {name}", text, name, "application/jsonl", type="primary")


def _values(label: str, counts: Mapping[str, int]) -> list[str]:
    """Let the user choose among the values of a column, each shown with its examples."""
    selected: list[str] = st.multiselect(
        label, list(counts), width=220, format_func=lambda value: f"{value} ({counts[value]:,})"
    )
    return selected


def _upload() -> None:
    if not session.may("admin"):
        return
    loop = session.loop()
    st.caption(
        "JSON lines as OpenAI's fine-tuning takes them: `messages` with the answer last, or `input`, "
        "`preferred_output` and `non_preferred_output` for preferences."
    )
    method: Method = st.segmented_control(
        "Kind of examples", ["supervised", "dpo"], default="supervised", required=True
    )
    given = st.file_uploader("File", type=["jsonl"])
    if given is None:
        parts.empty("No file is chosen.", "Drop a file of JSON lines here. Its lines are checked before it is used.")
        return
    build = st.button("Build a dataset", type="primary", icon=":material/construction:")
    given.seek(0)  # an earlier run of the page may have read it
    with new_file() as file:
        while piece := given.read(_PIECE):
            file.write(piece)
        path = file.flushed()
        _show_preview(preview_file(loop, path, method, PREVIEWED))
        if build:
            with st.spinner("Building the dataset"):
                made = session.perform(
                    "dataset upload",
                    given.name,
                    lambda: dataset_from_file(loop, session.database(), path, method),
                    needs="admin",
                    detail=f"{file.size:,} bytes",
                )
            if made is not None:
                st.success(f"Dataset {made.manifest.version}: {counted(made.manifest.train, 'example')} to train on.")
                st.caption("Start a training with it on the page Training.")


def _show_preview(found: FilePreview) -> None:
    """Show what an uploaded file would give, and what is wrong with it."""
    if found.unusable:
        st.error(f"{counted(found.unusable, 'line')} cannot be used; the file becomes no dataset while there are any.")
        parts.table([{"line": line, "what is wrong": session.redacted(error)} for line, error in found.errors])
    st.markdown(f"{counted(found.examples, 'line')} can be used.")
    if found.left_out:
        parts.table(_counts(found.left_out))
    if found.rows:
        parts.table(
            [
                {
                    "line": row.line,
                    "prompt": row.prompt[:300],
                    "completion": row.completion[:300],
                    "left out": row.left_out,
                }
                for row in found.rows
            ],
            column_config={"prompt": {"width": 300}, "completion": {"width": 300}},
        )


def _sources() -> None:
    loop = session.loop()
    if not loop.sources:
        parts.empty(
            "No source is declared.",
            "Notes, code, documents, files and databases are declared under `sources` in the loop's YAML: "
            "docs/how-to/sources.md.",
        )
        return
    with session.database().read() as connection:
        given = active_sources(connection, loop.name)
        skipped = skipped_records(connection, loop, _SKIPPED)
    counts = {source.name: sum(row.source == source.name for row in skipped) for source in loop.sources}
    parts.table(
        [
            {
                "source": source.name,
                "kind": source.kind,
                "interactions": given.get(source.name, 0),
                "skipped at the last sync": counts[source.name],
            }
            for source in loop.sources
        ]
    )
    if skipped:
        with st.expander("What was skipped, and why"):
            parts.table(
                [
                    {
                        "source": row.source,
                        "where": session.redacted(row.provenance),
                        "why": session.redacted(row.reason),
                    }
                    for row in skipped
                ]
            )
    name = st.selectbox("Source", [source.name for source in loop.sources])
    if st.button("Preview", help="Reads the complete source and records nothing; its teacher is not asked."):
        with st.spinner(f"Reading {name}"):
            preview = preview_source(loop, name, SAMPLE)
        if preview.error:
            st.error(session.redacted(preview.error))
        st.markdown(
            f"{counted(preview.records, 'record')}, of which {counted(preview.examples, 'example')} for a dataset."
        )
        parts.table(
            _counts({**preview.left_out, **preview.skipped}) or [{"reason": "nothing is left out", "examples": 0}]
        )
        parts.table(
            [
                {
                    "where": one.provenance,
                    "prompt": one.prompt[:300],
                    "completion": one.completion[:300],
                    "reward": f"{one.reward:+.2f}",
                    "left out": one.left_out,
                }
                for one in preview.shown
            ]
        )
