"""The script that Streamlit runs for every visit and click: the navigation, the loop and the user."""

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.console.guard import LOGOUT
from finetune_pipeline.console.known_loops import known_loops
from finetune_pipeline.console.views import (
    compare,
    data,
    interactions,
    models,
    overview,
    review,
    settings,
    training,
    try_models,
)

PAGES = (
    st.Page(overview.show, title="Overview", icon=":material/monitoring:", url_path="overview", default=True),
    st.Page(try_models.show, title="Try and rate", icon=":material/chat:", url_path="try"),
    st.Page(review.show, title="Review", icon=":material/fact_check:", url_path="review"),
    st.Page(interactions.show, title="Interactions", icon=":material/forum:", url_path="interactions"),
    st.Page(data.show, title="Data", icon=":material/database:", url_path="data"),
    st.Page(training.show, title="Training", icon=":material/model_training:", url_path="training"),
    st.Page(compare.show, title="Compare", icon=":material/compare:", url_path="compare"),
    st.Page(models.show, title="Models", icon=":material/deployed_code:", url_path="models"),
    st.Page(settings.show, title="Settings", icon=":material/settings:", url_path="settings"),
)


def main() -> None:
    """Show the sidebar and the chosen page."""
    st.set_page_config(page_title="finetune console", page_icon="🔁", layout="wide")
    st.html(parts.STYLE)
    page = st.navigation(list(PAGES))
    user, loops = session.user(), known_loops()
    if not loops:
        st.error("No loop is declared. `finetune init` writes one; docs/how-to/declare-a-loop.md shows how.")
        st.stop()
    with st.sidebar:
        names = list(loops)
        chosen = st.session_state.get("loop")
        st.session_state["loop"] = st.selectbox(
            "Loop", names, index=names.index(chosen) if chosen in names else 0, help="One task with its model and data."
        )
        if user.by_key:
            st.caption(f"Logged in as {user.name} ({', '.join(sorted(user.scopes))})")
            st.link_button("Log out", LOGOUT)
        else:
            st.text_input("Your name", key="own_name", placeholder=user.name, help="Recorded with what you do.")
        st.link_button("Open Dagster", session.dagster().url, icon=":material/open_in_new:", width="stretch")
    session.show_notice()
    page.run()


main()
