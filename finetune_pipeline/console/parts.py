"""Pieces of pages: headings, cards of figures, tables, empty states, texts of models."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from finetune_pipeline.evaluation.metric_table import BUSY, MetricRow, format_metric

STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 3rem; padding-bottom: 3rem; max-width: 76rem }
[data-testid="stHeader"] { background: transparent }
.st-key-cards > [data-testid="stVerticalBlock"], .st-key-cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem }
.st-key-cards > div { min-width: 0 }
[data-testid="stCaptionContainer"] { color: inherit; opacity: .82 }
[data-testid^="stBaseButton-primary"]:not(:disabled) p, [data-testid="stMultiSelect"] span[title] {
  color: light-dark(#ffffff, #14171c) }
</style>"""
"""What the theme cannot say: less empty space, cards that fill the width of a phone or a desk, and text with the
contrast that WCAG asks for."""

ACCENT = "#3f82b3"
"""The color of charts, readable on both backgrounds."""

OTHER = "#9aa5b1"
"""The color of the other one of two models in a chart."""

MUTED = "#7b8794"
"""The color of text in charts, readable on both backgrounds."""


def heading(title: str, explanation: str) -> None:
    """Show the title of a page and what it is for."""
    st.title(title)
    st.caption(explanation)


def empty(message: str, what_to_do: str) -> None:
    """Show that there is nothing to show, and what to do about it."""
    with st.container(border=True):
        st.markdown(f"**{message}**")
        st.markdown(what_to_do)


def cards(figures: Sequence[tuple[str, str, str]]) -> None:
    """Show figures in cards: label, value, and an explanation."""
    with st.container(key="cards"):
        for label, value, explanation in figures:
            st.metric(label, value, help=explanation or None, border=True)


def line(data: pd.DataFrame, x: str, y: str, *, percent: bool = False) -> None:
    """Show a line with its points."""
    axis = alt.Axis(format=".1%" if percent else ",", tickCount=5)
    chart = (
        alt.Chart(data)
        .mark_line(point=alt.OverlayMarkDef(size=30, color=ACCENT), color=ACCENT)
        .encode(
            x=alt.X(x, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True, title=None)),
            y=alt.Y(y, axis=axis, title=None, scale=alt.Scale(zero=False, nice=True)),
            tooltip=[x, alt.Tooltip(y, format=".1%" if percent else ",.4~g")],
        )
    )
    st.altair_chart(chart.properties(height=200), width="stretch")


def bars(data: pd.DataFrame, x: str, y: str) -> None:
    """Show bars."""
    chart = (
        alt.Chart(data)
        .mark_bar(color=ACCENT, size=14)
        .encode(
            x=alt.X(x, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True, title=None)),
            y=alt.Y(y, title=None),
            tooltip=[x, alt.Tooltip(y, format=",")],
        )
    )
    st.altair_chart(chart.properties(height=200), width="stretch")


def metric_bars(rows: Sequence[MetricRow], first: str, second: str) -> None:
    """Show metrics of two models as pairs of bars: fractions as they are, others relative to the larger value."""
    data = []
    for row in rows:
        largest = 1.0 if row.unit == "%" else max(abs(value or 0.0) for value in (row.champion, row.challenger))
        for model, value in ((first, row.champion), (second, row.challenger)):
            if value is not None:
                text = format_metric(value, row.unit)
                data.append(
                    {
                        "metric": row.name.removesuffix(BUSY),
                        "model": model,
                        "length": value / (largest or 1.0),
                        "value": text,
                    }
                )
    base = alt.Chart(pd.DataFrame(data)).encode(
        y=alt.Y("metric:N", sort=None, title=None, axis=alt.Axis(labelLimit=170, ticks=False)),
        yOffset=alt.YOffset("model:N", sort=[first, second]),
    )
    drawn = base.mark_bar().encode(
        x=alt.X("length:Q", axis=None, scale=alt.Scale(domain=[0, 2])),
        color=alt.Color(
            "model:N", sort=[first, second], scale=alt.Scale(domain=[first, second], range=[OTHER, ACCENT]),
            legend=alt.Legend(orient="top", title=None, direction="vertical", labelLimit=300),
        ),
        tooltip=["model", "metric", "value"],
    )  # fmt: skip
    labels = base.mark_text(align="left", dx=4, color=MUTED, fontSize=11).encode(x="length:Q", text="value")
    if flag := next((row.flag for row in rows if row.flag), None):
        st.caption(flag)
    st.altair_chart((drawn + labels).properties(height=alt.Step(16)), width="stretch")


def table(rows: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Show rows as a table without an index; return Streamlit's answer if rows can be selected."""
    return st.dataframe(pd.DataFrame(list(rows)), hide_index=True, width="stretch", **options)


def answer(text: str) -> None:
    """Show a text of a model: JSON indented, anything else as it is. It is never interpreted."""
    st.code(pretty(text), language=None, wrap_lines=True)  # Streamlit's colors of code have too little contrast


def is_json(text: str) -> bool:
    """Return whether a text is a JSON object or list."""
    if text.lstrip()[:1] not in {"{", "["}:
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def pretty(text: str) -> str:
    """Return JSON indented, and any other text as it is."""
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False) if is_json(text) else text


def plain(text: str) -> str:
    """Return a text in which Markdown and HTML mean nothing, except code between backquotes."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # a backquote without its other one
        return _escaped(text)
    return "".join(f"`{piece}`" if number % 2 else _escaped(piece) for number, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in _SPECIAL else character for character in text)


_SPECIAL = "\\`*_{}[]<>()#+-.!|~$:&"
