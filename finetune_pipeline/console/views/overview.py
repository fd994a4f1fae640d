"""Overview: is the loop healthy, what is missing for the next training, and what to do next."""

from collections.abc import Iterator

import pandas as pd
import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.curation.retrain_trigger import describe
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.statistics import BINS
from finetune_pipeline.orchestrator import Automation, Orchestrator, OrchestratorError
from finetune_pipeline.pipeline.overview import LoopFigures, loop_figures
from finetune_pipeline.pipeline.status import LoopStatus, loop_status
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.wording import counted, sentence


def show() -> None:
    """Show the page."""
    loop = session.loop()
    parts.heading("Overview", loop.description or f"The loop {loop.name}.")
    figures, status = session.cached(loop_figures), session.cached(loop_status)
    automation = _automation()
    problems = list(_problems(loop, status, figures, automation))
    if problems:
        st.warning("\n".join(f"- {one}" for one in problems), icon=":material/warning:")
    else:
        st.success("The loop is healthy.", icon=":material/check_circle:")
    _cards(loop, figures, status)
    left, right = st.columns(2)
    with left:
        _next_training(loop, status)
    with right:
        _what_to_do(loop, status, figures)
    _charts(figures)
    _last_runs(figures)
    _shown_automation(automation)


def _ask_dagster(_loop: LoopSettings, _database: Database, url: str) -> Automation | str:
    try:
        return Orchestrator(url, timeout_seconds=5).automation()
    except OrchestratorError as error:
        return str(error)


def _automation() -> Automation | str:
    """Return what starts runs by itself, or why that is unknown."""
    return session.cached(_ask_dagster, session.dagster().url)


def _problems(
    loop: LoopSettings, status: LoopStatus, figures: LoopFigures, automation: Automation | str
) -> Iterator[str]:
    for folder in status.missing_folders:
        yield f"The log folder {folder} does not exist. Create it, or correct ingest.folders."
    for target in status.targets:
        if target.state in {"failed", "rejected", "drifted"}:
            yield f"The target {parts.plain(target.summary)}. The page Models says why."
    newest = figures.jobs[0] if figures.jobs else None
    if newest is not None and newest.status == "failed":
        yield f"The last training failed: {parts.plain(session.redacted(newest.error.partition(chr(10))[0][:300]))}"
    if isinstance(automation, Automation):
        on = [name for name, is_on in automation.switched_on.items() if is_on and name.startswith(f"{loop.name}_")]
        if on and not automation.daemon:
            yield f"{', '.join(on)} switched on, but Dagster's daemon does not run. Start `finetune ui`."


def _cards(loop: LoopSettings, figures: LoopFigures, status: LoopStatus) -> None:
    live, champion = figures.live, figures.champion
    serving = sum(target.state == "active" for target in status.targets)
    reward = f"{live.average_reward:+.2f}" if live.average_reward is not None else "\u2013"
    parts.cards(
        [
            ("Champion", champion.version if champion else "base model", "The model that serves."),
            (
                "Serves since",
                f"{figures.champion_since:%Y-%m-%d}" if figures.champion_since else "\u2013",
                session.moment(figures.champion_since),
            ),
            (
                "Accuracy",
                session.percent(champion.accuracy if champion else None),
                "Of the champion on the benchmark; a base model is measured when it is first compared.",
            ),
            (
                "Live reward",
                reward,
                f"Mean reward of the champion's answers in use: {counted(live.answers, 'answer')}.",
            ),
            (
                "Average win rate",
                session.percent(figures.average_win_rate),
                "Over the versions that were judged in use.",
            ),
            ("Gold stars", f"{figures.gold:,}", "Answers that somebody called exemplary."),
            ("Active trainings", f"{figures.active_jobs:,}", "Training jobs that wait or run."),
            (
                "Targets in service",
                f"{serving} of {len(status.targets)}",
                "Servers and folders that serve the champion.",
            ),
            ("To review", f"{status.to_review:,}", "Examples that a person should look at."),
            ("Interactions", f"{status.interactions:,}", "Logged prompts with their answers."),
        ]
    )


def _next_training(loop: LoopSettings, status: LoopStatus) -> None:
    st.subheader("Next training")
    needed = loop.trigger.new_examples
    st.progress(
        min(1.0, status.new_examples / needed) if needed else 1.0,
        text=describe(status.new_examples, loop.trigger, at_least=status.new_at_least) + ".",
    )
    if status.not_counted:
        rows = sorted(status.not_counted.items(), key=lambda item: -item[1])
        st.caption("What does not count, and why:")
        parts.table([{"reason": reason, "examples": count} for reason, count in rows])
    elif not status.new_examples:
        st.caption("No new feedback since the last judged dataset.")


def _what_to_do(loop: LoopSettings, status: LoopStatus, figures: LoopFigures) -> None:
    st.subheader("What to do next")
    steps = []
    if status.approval:
        steps.append(f"{status.approval.name} is {status.approval.state}. Decide on the page Models.")
    if status.interactions == 0:
        steps.append(
            "No interaction is stored yet. Log those of your application through the gateway (`finetune serve`), put "
            "event files into the drop folder, ask a model on the page Try and rate, or upload examples on the page "
            "Data."
        )
    if status.unread_files:
        steps.append(f"{counted(status.unread_files, 'event file')} to ingest: `finetune ingest`, or run raw_logs.")
    if status.to_review:
        optional = "" if loop.review.required else " (optional)"
        steps.append(f"{counted(status.to_review, 'example')} to review{optional}.")
    if status.unmatched:
        steps.append(f"{counted(status.unmatched, 'feedback event')} without an interaction; check the ids.")
    if status.new_examples >= loop.trigger.new_examples:
        steps.append("There are enough new examples: start a training on the page Training.")
    elif not steps:
        missing = loop.trigger.new_examples - status.new_examples
        steps.append(f"Collect feedback: {counted(missing, 'example')} more start the next training.")
    st.markdown("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))


def _charts(figures: LoopFigures) -> None:
    accuracy, size, rewards = st.columns(3)
    with accuracy:
        st.subheader("Accuracy")
        rows = [
            {"version": one.version.version, "accuracy": one.version.accuracy}
            for one in figures.versions
            if one.version.accuracy is not None
        ]
        if rows:
            parts.line(pd.DataFrame(rows), "version", "accuracy", percent=True)
        else:
            st.caption("No version was evaluated yet; the first training shows one.")
    with size:
        st.subheader("Training examples")
        sizes = [{"version": one.version.version, "examples": one.examples} for one in figures.versions if one.examples]
        if sizes:
            parts.bars(pd.DataFrame(sizes), "version", "examples")
        else:
            st.caption("No version was trained yet.")
    with rewards:
        st.subheader("Rewards")
        if sum(figures.rewards.histogram):
            bins = [f"{low:+.1f}" for low, _ in BINS]
            data = pd.DataFrame({"reward from": bins, "examples": figures.rewards.histogram})
            parts.bars(data, "reward from", "examples")
        else:
            st.caption("No answer has feedback yet.")


def _last_runs(figures: LoopFigures) -> None:
    st.subheader("Last runs")
    if not figures.jobs:
        st.caption("No training was started yet. The page Training starts one.")
        return
    parts.table(
        [
            {
                "job": job.id,
                "started by": f"{job.created_by} ({job.origin})",
                "created": session.moment(job.created_at),
                "status": job.status,
                "ended": session.moment(job.finished_at),
                "adapter": job.adapter or "",
            }
            for job in figures.jobs
        ]
    )


def _shown_automation(automation: Automation | str) -> None:
    st.subheader("Automation")
    if isinstance(automation, str):
        st.caption(parts.plain(sentence(automation)))
        return
    loop = session.loop()
    rows = [{"name": "Dagster's daemon", "state": "running" if automation.daemon else "stopped"}]
    rows += [
        {"name": name, "state": "on" if is_on else "off"}
        for name, is_on in automation.switched_on.items()
        if name.startswith(f"{loop.name}_")
    ]
    parts.table(rows)
    st.caption("Sensor and schedules are switched on and off in Dagster: docs/how-to/automate.md.")
