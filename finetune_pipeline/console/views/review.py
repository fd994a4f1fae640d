"""Review: decide what trains, one example at a time, with one key for each decision."""

import streamlit as st

from finetune_pipeline.console import parts, read_cache, session
from finetune_pipeline.feedback.store import StoredInteraction
from finetune_pipeline.pipeline.interactions import redact_stored
from finetune_pipeline.pipeline.review_queue import ReviewSession, editable, in_style_of, review_queue
from finetune_pipeline.records import ReviewKind
from finetune_pipeline.wording import sentence

_DONE = {"approve": "approved", "edit": "edited", "reject": "rejected", "skip": "skipped", "undo": "undone"}


def show() -> None:
    """Show the page."""
    loop = session.loop()
    parts.heading(
        "Review",
        "Decide what trains: a approves, x rejects, e edits, s skips, u undoes. Each decision is stored at once under "
        "your name and holds for every later dataset.",
    )
    if not session.may("feedback"):
        return
    reviewer = session.actor()
    review = _session(reviewer)
    counts = review.counts()
    done = ", ".join(f"{counts[name]} {word}" for name, word in _DONE.items() if counts[name])
    left = len(review.queue) - review.position
    st.caption(f"{parts.plain(reviewer)}: {done or 'nothing decided'}; {left} of this queue left.")
    while review.position < len(review.queue) and (obsolete := review.refresh()):
        st.info(sentence(obsolete))
        review.position += 1
    if review.position >= len(review.queue):
        what = "an optional step" if not loop.review.required else "required before an example trains"
        parts.empty(
            "No example needs a review.",
            f"Review is {what}. Answers with a low confidence, with contradicting feedback, or similar to a weak part "
            "of the benchmark appear here.",
        )
        left_column, _ = st.columns([1, 3])
        if left_column.button("Look again", icon=":material/refresh:"):
            st.session_state.pop("review", None)
            read_cache.clear()
            st.rerun()
        _undo_button(review)
        return
    _example(review)


def _session(reviewer: str) -> ReviewSession:
    """Return this browser's way through the queue; a new one for another loop or reviewer."""
    loop = session.loop()
    owner, found = st.session_state.get("review", (None, None))
    if owner != (loop.name, reviewer):
        found = ReviewSession(loop, session.database(), reviewer, queue=session.cached(review_queue))
        st.session_state["review"] = ((loop.name, reviewer), found)
    assert isinstance(found, ReviewSession)
    return found


def _example(review: ReviewSession) -> None:
    loop, queued = session.loop(), review.queue[review.position]
    candidate = queued.candidate
    stored = redact_stored(
        StoredInteraction(candidate.interaction, candidate.feedback, candidate.example), loop.curation.redaction
    )
    shown = stored.example.target if stored.example else stored.interaction.output
    st.progress(review.position / len(review.queue), text=f"Example {review.position + 1} of {len(review.queue)}")
    with st.container(horizontal=True, key="decisions"):
        if st.button("Approve", key="approve", shortcut="A", type="primary"):
            _approve(review)
        if st.button("Reject", key="reject", shortcut="X"):
            _decide(review, "reject", review.current.answer)
        if st.button("Edit", key="edit", shortcut="E"):
            st.session_state["editing"] = str(candidate.interaction.id)
        if st.button("Skip", key="skip", shortcut="S"):
            review.skip()
            st.rerun()
        _undo_button(review)
    left, right = st.columns([3, 2])
    with left:
        for turn in stored.interaction.history:
            st.caption(turn.role)
            parts.answer(turn.content)
        st.caption("prompt")
        parts.answer(stored.interaction.prompt)
        if shown != stored.interaction.output:
            st.caption("output of the model")
            parts.answer(stored.interaction.output)
        if st.session_state.get("editing") == str(candidate.interaction.id):
            _editor(review, shown)
        else:
            st.caption("answer to decide on")
            parts.answer(shown)
    with right:
        _facts(review, stored)


def _facts(review: ReviewSession, stored: StoredInteraction) -> None:
    queued = review.queue[review.position]
    st.caption("why it is here")
    st.markdown("\n".join(f"- {parts.plain(reason)}" for reason in queued.reasons))
    interaction, example = stored.interaction, stored.example
    origin = "application log" if interaction.source is None else f"{interaction.source}, {interaction.provenance}"
    facts = {"from": origin, "logged": session.moment(interaction.created_at), "model": interaction.model or "unknown"}
    if interaction.user:
        facts["user"] = interaction.user
    if interaction.confidence is not None:
        facts["confidence"] = f"{interaction.confidence:.2f}"
    if example is not None:
        facts["reward"] = f"{example.reward:+.2f}"
    parts.table([{"": name, "value": value} for name, value in facts.items()])
    for feedback, reward in zip(stored.feedback, queued.candidate.rewards, strict=True):
        who = f" by {parts.plain(feedback.user)}" if feedback.user else ""
        st.markdown(f"{parts.plain(feedback.kind)} {reward:+.2f}{who}")
        if feedback.correction:
            parts.answer(feedback.correction)
    if problem := review.rejection_reason(review.current.answer):
        st.warning(f"It cannot train as it is: {parts.plain(problem)}. Edit or reject it.")


def _editor(review: ReviewSession, shown: str) -> None:
    with st.form("editor", border=False):
        edited = st.text_area("Correct answer", editable(shown), height=260)
        save, cancel = st.columns(2)
        saved = save.form_submit_button("Save", type="primary", width="stretch")
        if cancel.form_submit_button("Cancel", width="stretch"):
            st.session_state.pop("editing", None)
            st.rerun()
    if not saved:
        return
    target = in_style_of(shown, edited)
    if target == shown:
        _approve(review)
    elif problem := review.rejection_reason(target):
        st.error(f"It cannot train like this: {parts.plain(problem)}.")
    else:
        _decide(review, "edit", target)


def _approve(review: ReviewSession) -> None:
    answer = review.current.answer
    if problem := review.rejection_reason(answer):
        st.error(f"It cannot train as it is: {parts.plain(problem)}. Edit or reject it.")
    else:
        _decide(review, "approve", answer)


def _decide(review: ReviewSession, kind: ReviewKind, target: str) -> None:
    def work() -> bool:
        review.decide(kind, target)
        return True

    if session.perform(f"review {kind}", str(review.current.interaction.id), work, needs="feedback"):
        st.session_state.pop("editing", None)
        st.rerun()


def _undo_button(review: ReviewSession) -> None:
    if not st.button("Undo", key="undo", shortcut="U"):
        return
    undone = session.perform("review undo", review_subject(review), review.undo, needs="feedback")
    if undone:
        st.rerun()
    elif undone is False:
        st.info("There is no decision of yours to undo.")


def review_subject(review: ReviewSession) -> str:
    """Return the id of the current example; empty at the end of the queue."""
    return str(review.current.interaction.id) if review.position < len(review.queue) else ""
