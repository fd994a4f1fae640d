"""Interactions: find logged prompts and answers, and see what each trains and why."""

from datetime import UTC, datetime, time, timedelta
from uuid import UUID

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.console.rating import rating
from finetune_pipeline.feedback.search import UNRATED, InteractionFilter
from finetune_pipeline.feedback.store import StoredInteraction
from finetune_pipeline.pipeline.interactions import find_interactions, view_interaction
from finetune_pipeline.pipeline.lineage import made_with

PAGE = 25
LABELS = ("success", "validation_failure", "thumbs_up", "thumbs_down", "correction", "rating", "reward", UNRATED)


def show() -> None:
    """Show the page."""
    parts.heading("Interactions", "What was asked and answered, what people said about it, and what it trains.")
    wanted = _filter()
    page = st.session_state.get("page", 0)
    if st.session_state.get("filter") != wanted:
        st.session_state["filter"], page = wanted, 0
    found = session.cached(find_interactions, wanted, PAGE + 1, page * PAGE)
    rows, more = found[:PAGE], len(found) > PAGE
    if not rows and page == 0:
        if wanted == InteractionFilter():
            parts.empty(
                "No interaction is stored yet.",
                "Log those of your application through the gateway (`finetune serve`) or by event files, or ask a "
                "model on the page **Try and rate**.",
            )
        else:
            parts.empty("No interaction matches.", "Widen or clear the filter.")
        return
    selected = parts.table(
        [_row(one) for one in rows],
        key=f"found-{page}",
        on_select="rerun",
        selection_mode="single-row",
        height=min(36 * len(rows) + 38, 420),
        column_config={"prompt": {"width": 300}, "answer": {"width": 210}, "feedback": {"width": 130}},
    )
    with st.container(horizontal=True):
        if st.button("Newer", disabled=page == 0, icon=":material/chevron_left:"):
            st.session_state["page"] = page - 1
            st.rerun()
        if st.button("Older", disabled=not more, icon=":material/chevron_right:"):
            st.session_state["page"] = page + 1
            st.rerun()
        st.caption(f"{page * PAGE + 1:,} to {page * PAGE + len(rows):,}. Select a row to open it.")
    st.session_state["page"] = page
    chosen = selected.selection.rows
    if chosen and chosen[0] < len(rows):
        _open(rows[chosen[0]].interaction.id)


def _filter() -> InteractionFilter:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input("Text", placeholder="in prompt, answer or correction", width=280)
        user = st.text_input("User", width=140)
        label = st.selectbox("Feedback", LABELS, index=None, placeholder="any", width=180)
        with st.popover("More"):
            since = st.date_input("From", None)
            until = st.date_input("To", None)
            reward = st.slider("Reward", -1.0, 1.0, (-1.0, 1.0), 0.1)
            confidence = st.slider("Confidence", 0.0, 1.0, (0.0, 1.0), 0.05)
    return InteractionFilter(
        text=text.strip() or None,
        user=user.strip() or None,
        label=label,
        since=datetime.combine(since, time(), UTC) if since else None,
        until=datetime.combine(until, time(), UTC) + timedelta(days=1) if until else None,  # the day with all its hours
        reward=reward if reward != (-1.0, 1.0) else None,
        confidence=confidence if confidence != (0.0, 1.0) else None,
    )


def _row(one: StoredInteraction) -> dict[str, object]:
    interaction = one.interaction
    return {
        "logged (UTC)": f"{interaction.created_at:%Y-%m-%d %H:%M}",
        "prompt": " ".join(interaction.prompt.split())[:200],
        "answer": " ".join(interaction.output.split())[:200],
        "feedback": ", ".join(feedback.kind for feedback in one.feedback),
        "reward": f"{one.example.reward:+.2f}" if one.example else "",
        "confidence": f"{interaction.confidence:.2f}" if interaction.confidence is not None else "",
        "user": interaction.user or "",
        "model": interaction.model or "",
    }


def _open(id: UUID) -> None:
    loop = session.loop()
    view = view_interaction(loop, session.database(), id)
    if view is None:
        st.info("The interaction was deleted in the meantime.")
        return
    interaction = view.stored.interaction
    st.subheader("Interaction")
    left, right = st.columns([3, 2])
    with left:
        for turn in interaction.history:
            st.caption(turn.role)
            parts.answer(turn.content)
        st.caption("prompt")
        parts.answer(interaction.prompt)
        st.caption(f"answer of {parts.plain(interaction.model or 'an unknown model')}")
        parts.answer(interaction.output)
    with right:
        st.caption("what it trains")
        icon = ":material/check_circle:" if view.trains.accepted else ":material/block:"
        (st.success if view.trains.accepted else st.info)(parts.plain(view.trains.reason), icon=icon)
        if view.trains.target is not None and view.trains.target != interaction.output:
            parts.answer(view.trains.target)
        st.caption("feedback" if view.stored.feedback else "no feedback yet")
        for feedback, reward in zip(view.stored.feedback, view.rewards, strict=True):
            value = feedback.rating or (f"{feedback.score:g}" if feedback.score is not None else "")
            who = f" by {parts.plain(feedback.user)}" if feedback.user else ""
            time_given = session.moment(feedback.created_at)
            st.markdown(f"{parts.plain(feedback.kind)} {value} **{reward:+.2f}**{who}, {time_given}")
            if feedback.correction:
                parts.answer(feedback.correction)
        st.caption(f"id {interaction.id}")
        if st.button("Where is it used?", help="Searches snapshots, datasets and models; takes some seconds."):
            with st.spinner("Searching snapshots and datasets"):
                made = made_with(session.database(), loop, [str(id)])
            datasets = ", ".join(path.name for path in made.datasets) or "no dataset"
            st.markdown(f"Datasets: {datasets}. Models: {parts.plain(', '.join(made.models) or 'none')}.")
    if session.user().may("feedback"):
        rating(id, interaction.output)
