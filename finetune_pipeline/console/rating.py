"""The controls with which a person rates or corrects one answer."""

from collections.abc import Callable
from uuid import UUID

import streamlit as st

from finetune_pipeline.console import session
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.pipeline.review_queue import editable, in_style_of
from finetune_pipeline.wording import sentence

Give = Callable[[FeedbackClient, str], UUID]


def rating(id: UUID, answer: str) -> None:
    """Show thumbs, stars, a gold star and an editor for an answer; each is recorded at once.

    Args:
        id: of the recorded interaction.
        answer: its output, redacted.
    """
    with st.container(horizontal=True, key=f"rating-{id}"):
        if st.button("Good", key=f"up-{id}", icon=":material/thumb_up:"):
            _give(id, "thumbs_up", lambda client, user: client.thumbs_up(id, user=user), "Thumbs up recorded.")
        if st.button("Bad", key=f"down-{id}", icon=":material/thumb_down:"):
            _give(id, "thumbs_down", lambda client, user: client.thumbs_down(id, user=user), "Thumbs down recorded.")
        if st.button("Gold star", key=f"gold-{id}", icon=":material/stars:", help="An exemplary answer."):
            _give(id, "gold", lambda client, user: client.rate(id, "gold", user=user), "Gold star recorded.")
    stars = st.feedback("stars", key=f"stars-{id}")
    if stars is not None and st.session_state.get(f"given-{id}") != stars:
        st.session_state[f"given-{id}"] = stars
        count = stars + 1
        _give(id, "rating", lambda client, user: client.rate(id, count, user=user), f"{count} of 5 stars recorded.")
    with st.expander("Correct the answer", icon=":material/edit:"):
        edited = st.text_area("The correct answer", editable(answer), key=f"edit-{id}", height=180)
        if st.button("Save the correction", key=f"save-{id}", type="primary"):
            correction = in_style_of(answer, edited)
            problem = correction_problem(session.loop(), correction)
            if correction == answer:
                st.error("The text is the answer itself. Change it, or say that it is good.")
            elif problem:
                st.error(sentence(problem))
            else:
                _give(
                    id,
                    "correction",
                    lambda client, user: client.correct(id, correction, user=user),
                    "Correction recorded.",
                )


def _give(id: UUID, kind: str, give: Give, done: str) -> None:
    def work() -> UUID:
        with FeedbackClient(session.loop(), database=session.database()) as client:
            return give(client, session.actor())

    if session.perform(f"feedback {kind}", str(id), work, needs="feedback") is not None:
        st.toast(done)
