"""Settings: the loop as its YAML declares it, links into Dagster, and who did what in the console."""

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.database.audit import list_audit
from finetune_pipeline.pipeline.declared_settings import declared_settings

ACTIONS = 100


def show() -> None:
    """Show the page."""
    loop = session.loop()
    parts.heading("Settings", f"The loop {loop.name} as read from its YAML; change them there.")
    url = session.dagster().url
    with st.container(horizontal=True):
        st.link_button("Assets", f"{url}/asset-groups", icon=":material/account_tree:")
        st.link_button("Runs", f"{url}/runs", icon=":material/history:")
        st.link_button("Sensor and schedules", f"{url}/automation", icon=":material/schedule:")
    rows = declared_settings(loop)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        wanted = st.text_input("Find", placeholder="part of a name or a description", width=320)
        only_given = st.toggle("Only what the YAML sets", value=True)
    shown = [
        row
        for row in rows
        if (row.given or not only_given) and wanted.lower().strip() in f"{row.name} {row.description}".lower()
    ]
    if shown:
        parts.table(
            [
                {"setting": row.name, "value": row.value, "default": row.default, "meaning": row.description}
                for row in shown
            ],
            height=min(36 * len(shown) + 38, 560),
        )
    else:
        parts.empty("No setting matches.", "Search for another word, or show all settings.")
    st.caption(f"{len(shown):,} of {len(rows):,} settings. docs/reference/settings.md explains each.")
    if session.user().may("admin"):
        _actions()


def _actions() -> None:
    st.subheader("Actions in the console")
    rows = list_audit(session.database(), session.loop().name, ACTIONS)
    if not rows:
        parts.empty("No action was taken in the console yet.", "Every action is listed here, with who did it.")
        return
    outcomes = {None: "unfinished", "": "done"}
    parts.table(
        [
            {
                "time": session.moment(row.created_at),
                "who": row.actor,
                "action": row.action,
                "about": row.subject,
                "reason": session.redacted(row.detail),
                "outcome": outcomes.get(row.outcome, session.redacted(row.outcome or "")),
            }
            for row in rows
        ]
    )
