"""Training: start a job, watch it, pause, resume and cancel it; a closed browser changes nothing."""

from typing import Any

import pandas as pd
import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.console.training_form import FieldError, all_wanted, training_fields
from finetune_pipeline.orchestrator import OrchestratorError
from finetune_pipeline.pipeline import jobs
from finetune_pipeline.pipeline.dataset_export import list_datasets
from finetune_pipeline.registry.training_jobs import IN_PROGRESS, TrainingJob, events_of, find_job, list_jobs
from finetune_pipeline.registry.trainings import list_trainings
from finetune_pipeline.wording import duration, sentence

LIVE_SECONDS = 2.0
"""Time between two looks at a job."""

FROM_LOGS = "build one from the logs"
_LISTED = 50
_EVENTS = 8


def show() -> None:
    """Show the page."""
    loop, database = session.loop(), session.database()
    parts.heading("Training", "A job trains, exports and compares a model, and never promotes it: you do, on Models.")
    known = list_jobs(database, loop.name, limit=_LISTED)
    if session.user().may("admin"):
        with st.expander("Start a training", expanded=not known, icon=":material/play_arrow:"):
            _start()
    if not known:
        parts.empty(
            "No training was started yet.",
            "Start one above. Dagster runs it: `finetune ui` has to run on this machine.",
        )
    else:
        names = {f"{job.created_at:%Y-%m-%d %H:%M}, {job.status}, {job.id[-6:]}": job.id for job in known}
        chosen = st.selectbox("Job", list(names.values()), format_func={id: name for name, id in names.items()}.get)
        running = find_job(database, chosen).status in IN_PROGRESS
        st.fragment(_watch, run_every=LIVE_SECONDS if running else None)(chosen)
    _history()


def _start() -> None:
    loop = session.loop()
    versions = [one.manifest.version for one in list_datasets(loop)]
    everything = all_wanted()
    with st.form("start", border=False):
        left, right = st.columns(2)
        dataset = left.selectbox("Dataset", [FROM_LOGS, *versions])
        base_model = right.text_input("Base model", loop.base_model, help="A folder, or a Hugging Face id.")
        try:
            own, problem = training_fields(loop.training, everything=everything), ""
        except FieldError as error:
            own, problem = {}, str(error)
        started = st.form_submit_button("Start", type="primary", icon=":material/play_arrow:")
    if not started:
        return
    if problem:
        st.error(sentence(problem))
        return
    settings: dict[str, Any] = {"training": own} if own else {}
    if base_model.strip() != loop.base_model:
        settings["base_model"] = base_model.strip()

    def work() -> TrainingJob:
        return jobs.create(
            session.database(),
            session.dagster(),
            loop,
            settings,
            origin="console",
            created_by=session.actor(),
            dataset=None if dataset == FROM_LOGS else dataset,
        )

    with st.spinner("Handing the job to Dagster"):
        job = session.perform("train start", loop.name, work, needs="admin")
    if job is not None:
        session.notify("The job was started.")
        st.rerun()


def _watch(id: str) -> None:
    """Show a job as it is now; a fragment that runs again by itself while the job is in progress."""
    database, loop = session.database(), session.loop()
    job, problem = find_job(database, id), ""
    was_running = job.status in IN_PROGRESS
    if was_running:
        try:
            job = jobs.sync(database, session.dagster(), loop, job)
        except OrchestratorError as error:
            problem = str(error)
    described = jobs.describe_job(database, job)
    wanted = {"launch": "waits for Dagster", "pause": "is being paused", "cancel": "is being canceled"}
    state = wanted.get(job.wanted or "", job.status)
    st.markdown(f"**{job.id}** by {parts.plain(job.created_by)} ({job.origin}): **{state}**")
    if problem:
        st.warning(parts.plain(sentence(problem)))
    if job.error:
        st.error(parts.plain(session.redacted(sentence(job.error))))
    _progress(described)
    _curve(id)
    _buttons(job)
    events = events_of(database, id)
    with st.expander("Events"):
        parts.table(
            [
                {"time": session.moment(event.created_at), "event": session.redacted(event.message)}
                for event in reversed(events[-_EVENTS:])
            ]
        )
    if was_running and job.status not in IN_PROGRESS:
        st.rerun()  # the whole page, which then no longer looks again by itself


def _progress(job: dict[str, Any]) -> None:
    import psutil

    progress = job["progress"]
    if not progress:
        if job["status"] in IN_PROGRESS:
            st.progress(0.0, text="The training has not begun yet: dataset and base model come first.")
        return
    left = job["seconds_left"]
    eta = f", {duration(left)} left" if left is not None else ""
    st.progress(min(1.0, job["percent"] / 100), text=f"Step {progress['step']:,} of {progress['steps']:,}{eta}")
    memory = progress.get("memory_bytes")
    host = psutil.virtual_memory()
    validation = progress.get("validation_loss")
    parts.cards(
        [
            ("Epoch", f"{progress['epoch']:.1f}", ""),
            ("Loss", f"{progress['loss']:.3f}", "Mean training loss since the step before."),
            ("Validation loss", f"{validation:.3f}" if validation is not None else "\u2013", ""),
            ("Learning rate", f"{progress['learning_rate']:.2g}", ""),
            ("Speed", f"{progress['tokens_per_second']:,.0f}", "Tokens per second."),
            (
                "Memory",
                f"{memory / 2**30:.1f} GiB" if memory else "\u2013",
                "Of the GPU when trained on one, else of the training process.",
            ),
            ("Machine", f"{host.used / 2**30:.0f} of {host.total / 2**30:.0f} GiB", "Memory in use on this machine."),
        ]
    )


def _curve(id: str) -> None:
    points = [event.data for event in events_of(session.database(), id) if event.kind == "metrics"]
    if len(points) > 1:
        st.caption("loss by step")
        data = pd.DataFrame(points)[["step", "loss"]].drop_duplicates("step")
        parts.line(data, "step:Q", "loss")


def _buttons(job: TrainingJob) -> None:
    if not session.user().may("admin") or job.wanted in {"pause", "cancel"}:
        return
    running = job.status in IN_PROGRESS
    with st.container(horizontal=True):
        if running and st.button("Pause", icon=":material/pause:"):
            _change("pause", job)
        if job.status == "paused" and st.button("Resume", icon=":material/play_arrow:", type="primary"):
            _change("resume", job)
        if (running or job.status == "paused") and st.button("Cancel", icon=":material/stop:"):
            _change("cancel", job)


def _change(action: str, job: TrainingJob) -> None:
    database, dagster, loop = session.database(), session.dagster(), session.loop()
    change = {"pause": jobs.pause, "resume": jobs.resume, "cancel": jobs.cancel}[action]
    if session.perform(f"train {action}", job.id, lambda: change(database, dagster, loop, job.id), needs="admin"):
        st.rerun()


def _history() -> None:
    trainings = list_trainings(session.database(), session.loop().name)
    st.subheader("Finished trainings")
    if not trainings:
        st.caption("None yet.")
        return
    parts.table(
        [
            {
                "adapter": one.id,
                "finished": session.moment(one.created_at),
                "method": one.method,
                "mode": one.mode,
                "examples": one.examples,
                "steps": one.steps,
                "loss": f"{one.loss_before:.3f} -> {one.loss_after:.3f}",
                "time": duration(one.wall_seconds),
                "device": one.device,
            }
            for one in trainings
        ]
    )
