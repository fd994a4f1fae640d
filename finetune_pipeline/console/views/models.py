"""Models: versions and challengers, where they come from, decisions about them, and the deployment targets."""

from collections.abc import Callable

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.console.lineage_graph import lineage_graph
from finetune_pipeline.database import Database
from finetune_pipeline.deployment.target_state import TargetState
from finetune_pipeline.pipeline.approval import pending_approval, reject_challenger
from finetune_pipeline.pipeline.challengers import Challenger, list_challengers
from finetune_pipeline.pipeline.deploy import deployment_states, reconcile
from finetune_pipeline.pipeline.lineage import card, lineage
from finetune_pipeline.pipeline.model_actions import deploy_model, rollback_model
from finetune_pipeline.pipeline.promote import approve_challenger
from finetune_pipeline.registry.champion import archive, champion, switch, unarchive
from finetune_pipeline.registry.deployment_history import deployment_stack, list_deployments, list_history
from finetune_pipeline.registry.model_versions import ModelVersion, list_models
from finetune_pipeline.settings import LoopSettings

Tell = Callable[[str], None]


def show() -> None:
    """Show the page."""
    loop, database = session.loop(), session.database()
    parts.heading("Models", "Promoted versions, challengers, and what serves them.")
    versions, challengers = list_models(database, loop.name), list_challengers(database, loop.name)
    serving = champion(database, loop.name)
    pending = pending_approval(loop, database)
    if pending:
        st.warning(parts.plain(f"{pending.name}: {pending.state}. {pending.problem or pending.reason}"))
    name = serving.name if serving else f"{loop.name}@base"
    since = f" since {session.moment(serving.deployed_at)}" if serving else ""
    st.markdown(f"**{parts.plain(name)}** serves{since}.")
    _table(loop, database, versions, challengers, serving)
    if not versions and not challengers:
        parts.empty("No model was trained yet.", "A training makes the first one: start it on the page Training.")
    else:
        _details(loop, database, versions, challengers, serving)
    _targets(loop, database)
    _history(loop, database, versions)


def _table(
    loop: LoopSettings,
    database: Database,
    versions: list[ModelVersion],
    challengers: list[Challenger],
    serving: ModelVersion | None,
) -> None:
    archived = st.toggle("Show archived versions", key="archived") if any(v.archived_at for v in versions) else False
    stack = deployment_stack(list_deployments(database, loop.name))
    previous = stack[-2] if len(stack) > 1 else ""
    rows = [
        {
            "model": one.name,
            "state": one.verdict,
            "accuracy": session.percent(one.scores.get("accuracy")),
            "latency": "",
            "size": _megabytes(sum(file.size for file in one.gguf.manifest.files.values())),
            "created": session.moment(one.created_at),
        }
        for one in challengers
    ]
    for version in versions:
        if version.archived_at and not archived:
            continue
        states = [
            "champion" if serving and version.id == serving.id else "",
            "previous" if version.id == previous and not (serving and version.id == serving.id) else "",
            "archived" if version.archived_at else "",
            "files deleted" if version.deleted_at else "",
        ]
        rows.append(
            {
                "model": version.name,
                "state": ", ".join(filter(None, states)),
                "accuracy": session.percent(version.accuracy),
                "latency": f"{version.latency_ms:,.0f} ms" if version.latency_ms is not None else "",
                "size": _megabytes(version.size_bytes),
                "created": session.moment(version.created_at),
            }
        )
    rows.append(
        {"model": f"{loop.name}@base", "state": "" if serving else "champion", "accuracy": "", "latency": "",
         "size": "", "created": ""}
    )  # fmt: skip
    parts.table(rows)


def _details(
    loop: LoopSettings,
    database: Database,
    versions: list[ModelVersion],
    challengers: list[Challenger],
    serving: ModelVersion | None,
) -> None:
    st.subheader("One model")
    names = [*(one.name for one in challengers), *(one.name for one in versions)]
    first = names.index(serving.name) if serving and serving.name in names and not challengers else 0
    name = st.selectbox("Model", names, index=first, key="model", label_visibility="collapsed")
    version = next((one for one in versions if one.name == name), None)
    challenger = next((one for one in challengers if one.name == name), None)
    if version is not None:
        made_from = lineage(database, version)
        st.graphviz_chart(lineage_graph(loop, version, made_from, is_champion=version == serving), width="content")
        scores = {key: value for key, value in version.scores.items() if isinstance(value, int | float)}
        with st.expander("Scores and model card"):
            parts.table([{"metric": key, "value": f"{value:,.4g}"} for key, value in scores.items()])
            st.markdown(session.redacted(session.cached(_card, version.id)))
        _decisions_about_version(loop, database, version, serving)
    elif challenger is not None:
        reason = challenger.comparison.reason if challenger.comparison else "It was not evaluated."
        st.markdown(parts.plain(f"{challenger.verdict}: {reason.replace(chr(10), '; ')}"))
        _decisions_about_challenger(loop, database, challenger)
    report = (
        version.report_path
        if version
        else (challenger.comparison.report_path if challenger and challenger.comparison else None)
    )
    if report is not None and report.is_file():
        st.download_button("Download the report", report.read_bytes(), f"{name.replace('@', '-')}.html", "text/html")


def _card(loop: LoopSettings, database: Database, id: str) -> str:
    """Return the model card of a version; empty if it was deleted meanwhile."""
    return next((card(database, loop, one) for one in list_models(database, loop.name) if one.id == id), "")


def _decisions_about_version(
    loop: LoopSettings, database: Database, version: ModelVersion, serving: ModelVersion | None
) -> None:
    if not session.user().may("admin"):
        return
    is_champion = serving is not None and version.id == serving.id
    with st.container(border=True):
        reason = st.text_input("Reason", key=f"reason-{version.id}", placeholder="Recorded in the history")
        with st.container(horizontal=True):
            if st.button("Make it the champion", disabled=is_champion, type="primary", icon=":material/rocket_launch:"):
                _change(
                    "model switch",
                    version.name,
                    reason,
                    lambda _: switch(database, loop.name, version.version, session.actor(), reason, loop.deploy.config),
                    f"{version.name} is the champion now.",
                )
            if st.button("Switch to the base model", disabled=serving is None):
                _change(
                    "model switch",
                    f"{loop.name}@base",
                    reason,
                    lambda _: switch(database, loop.name, "base", session.actor(), reason, loop.deploy.config),
                    "The base model is the champion now.",
                )
            if st.button("Roll back", icon=":material/undo:", help="Restores the champion before the one that serves."):
                current = serving.name if serving else f"{loop.name}@base"
                _change(
                    "model rollback",
                    current,
                    reason,
                    lambda _: rollback_model(loop, current, session.actor(), reason),
                    "The previous champion serves again.",
                )
            if version.archived_at is None and st.button("Archive", disabled=is_champion):
                _note(
                    "model archive",
                    version.name,
                    reason,
                    lambda: archive(database, loop.name, version.version, session.actor(), reason),
                    f"{version.name} is archived.",
                )
            if version.archived_at is not None and st.button("Unarchive"):
                _note(
                    "model unarchive",
                    version.name,
                    reason,
                    lambda: unarchive(database, loop.name, version.version, session.actor(), reason),
                    f"{version.name} is shown again.",
                )


def _decisions_about_challenger(loop: LoopSettings, database: Database, challenger: Challenger) -> None:
    if not session.user().may("admin"):
        return
    pending = pending_approval(loop, database)
    waits = pending is not None and pending.approval.challenger_sha256 == challenger.sha256
    accepted = challenger.comparison is not None and challenger.comparison.promote
    with st.container(border=True):
        reason = st.text_input("Reason", key=f"reason-{challenger.sha256}", placeholder="Recorded in the history")
        force = not accepted and st.checkbox("Overrule the gate", help="Failed blocking checks still stop it.")
        with st.container(horizontal=True):
            if waits and st.button("Approve", type="primary"):
                _change(
                    "model approve",
                    challenger.name,
                    reason,
                    lambda tell: approve_challenger(loop, challenger, session.actor(), reason, tell),
                    f"{challenger.name} is the champion now.",
                )
            if waits and st.button("Reject"):
                _note(
                    "model reject",
                    challenger.name,
                    reason,
                    lambda: reject_challenger(database, loop, challenger, session.actor(), reason),
                    f"{challenger.name} is rejected; the champion stays.",
                )
            if accepted and not waits and st.button("Promote", type="primary"):
                _change(
                    "model promote",
                    challenger.name,
                    reason,
                    lambda tell: deploy_model(loop, challenger.name, session.actor(), reason, tell),
                    f"{challenger.name} is the champion now.",
                )
            if not accepted and st.button("Promote in spite of the gate", disabled=not force):
                _change(
                    "model force",
                    challenger.name,
                    reason,
                    lambda tell: deploy_model(loop, challenger.name, session.actor(), reason, tell, force=True),
                    f"{challenger.name} is the champion now.",
                )


def _change(action: str, subject: str, reason: str, work: Callable[[Tell], object], done: str) -> None:
    """Change the champion and bring the targets to it, with progress; say so on the next run of the page."""
    loop = session.loop()
    with st.status(f"{action.capitalize()}: {subject}", expanded=True) as status:

        def change() -> list[TargetState]:
            work(status.write)
            return reconcile(loop, status.write) if loop.deploy.followers else []

        states = session.perform(action, subject, change, needs="admin", detail=reason)
        if states is None:
            status.update(state="error")
            return
        status.update(state="complete")
    behind = [state.target for state in states if state.state != "active"]
    session.notify(done + (f" Not there yet: {', '.join(behind)}." if behind else ""))
    st.rerun()


def _note(action: str, subject: str, reason: str, work: Callable[[], object], done: str) -> None:
    """Perform a decision that does not change the champion."""
    if session.perform(action, subject, lambda: work() or True, needs="admin", detail=reason):
        session.notify(done)
        st.rerun()


def _targets(loop: LoopSettings, database: Database) -> None:
    st.subheader("Deployment targets")
    states = deployment_states(loop, database)
    if not states:
        parts.empty(
            "No target is declared.",
            "The gateway (`finetune serve`) follows the champion by itself. Other servers are declared under "
            "deploy.targets: docs/how-to/deploy.md.",
        )
        return
    parts.table(
        [
            {
                "target": state.target,
                "state": state.state,
                "wanted": state.wanted,
                "serves": state.observed or "",
                "tries": state.tries,
                "next try": session.moment(state.next_try_at) if state.next_try_at else "",
                "last error": session.redacted(state.last_error),
            }
            for state in states
        ]
    )
    if session.user().may("admin") and st.button("Deploy now", icon=":material/sync:"):
        with st.status("Bringing the targets to the champion", expanded=True) as status:
            done = session.perform(
                "deploy apply", loop.name, lambda: reconcile(loop, status.write, force=True), needs="admin"
            )
            status.update(state="complete" if done is not None else "error")
        if done is not None:
            st.rerun()


def _history(loop: LoopSettings, database: Database, versions: list[ModelVersion]) -> None:
    rows = list_history(database, loop.name)
    if not rows:
        return
    st.subheader("History")
    names = {version.id: version.name for version in versions}
    parts.table(
        [
            {
                "time": session.moment(row.created_at),
                "action": row.action,
                "model": names.get(row.model_id or "", f"{loop.name}@{row.model_id or 'base'}"),
                "who": row.actor,
                "why": row.reason.replace("\n", "; "),
            }
            for row in reversed(rows)
        ]
    )


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:,.1f} MB" if size is not None else ""
