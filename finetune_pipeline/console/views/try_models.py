"""Try and rate: ask up to three models side by side, and say what their answers are worth."""

from dataclasses import dataclass
from uuid import UUID

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.console.rating import rating
from finetune_pipeline.pipeline.ask import find_model, generate, record_answer
from finetune_pipeline.pipeline.challengers import list_challengers
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.model_versions import list_models

MAX_MODELS = 3


@dataclass(frozen=True)
class GivenAnswer:
    """An answer on the page, redacted, and the id under which it was recorded."""

    id: UUID
    model: str
    text: str
    confidence: float | None


def show() -> None:
    """Show the page."""
    loop, database = session.loop(), session.database()
    parts.heading(
        "Try and rate", "Ask models as your application would. Prompts and answers are recorded under your name."
    )
    if not session.may("feedback"):
        return
    versions = [model.version for model in list_models(database, loop.name) if model.deleted_at is None]
    challengers = [one.name.rpartition("@")[2] for one in list_challengers(database, loop.name)]
    serving = champion(database, loop.name)
    names = ["champion", "base", *versions, *challengers] if serving else ["base", *challengers]
    with st.form("ask", border=False):
        prompt = st.text_area(
            "Prompt", key="prompt", height=100, placeholder="What a user of your application would ask"
        )
        chosen = st.multiselect(
            "Models", names, default=names[:1], max_selections=MAX_MODELS, help="Up to three, side by side."
        )
        asked = st.form_submit_button("Ask", type="primary", icon=":material/send:")
    if asked and not prompt.strip():
        st.error("The prompt is empty. Write what the model should answer.")
    elif asked and not chosen:
        st.error("No model is chosen. Choose at least one.")
    elif asked:
        st.session_state["answers"] = [one for name in chosen for one in _ask(prompt, name)]
        st.session_state["asked"] = loop.name
    answers: list[GivenAnswer] = st.session_state.get("answers", [])
    if not answers or st.session_state.get("asked") != loop.name:
        parts.empty("No answer yet.", "Write a prompt, choose models and press **Ask**.")
        return
    for column, one in zip(st.columns(len(answers)), answers, strict=True):
        with column:
            st.markdown(f"**{parts.plain(one.model)}**")
            parts.answer(one.text)
            if one.confidence is not None:
                st.caption(f"confidence {one.confidence:.2f}")
            rating(one.id, one.text)


def _ask(prompt: str, name: str) -> list[GivenAnswer]:
    """Return the answer of a model, recorded; nothing if it failed, which is shown."""
    loop = session.loop()

    def work() -> GivenAnswer:
        with st.status(f"Asking {name}", expanded=False) as status:
            full_name, spec = find_model(loop, name, status.write)
            status.update(label=f"{full_name} is loading and answering")
            completion = generate(loop, spec, prompt)[0]
            id = record_answer(loop, prompt, full_name, completion, session.actor())
            status.update(label=f"{full_name} has answered", state="complete")
        return GivenAnswer(id, full_name, session.redacted(completion.text), completion.confidence)

    answer = session.perform("ask", name, work, needs="feedback")
    return [answer] if answer else []
