"""Markdown tables, whatever their cells hold."""

from finetune_pipeline.markdown_table import cell, markdown_table


def test_a_table_has_headings_alignment_and_rows():
    table = markdown_table(["source", "examples"], [("logs", 12_345), ("notes", 0.5)], "lr")
    assert table == "| source | examples |\n|---|---:|\n| logs | 12,345 |\n| notes | 0.5 |"
    assert markdown_table(["", ""], []) == "|  |  |\n|---|---|"


def test_no_value_ends_its_cell_or_starts_html():
    assert cell("a|b\n<script>  c") == "a\\|b &lt;script> c"
    assert [cell(value) for value in (True, None, -1_000)] == ["True", "None", "-1,000"]
