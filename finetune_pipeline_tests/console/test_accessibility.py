"""No page keeps people out more than Streamlit itself does: axe-core's serious findings on each page."""

import pytest

from finetune_pipeline_tests.console.conftest import OpenConsole, start_empty_page
from finetune_pipeline_tests.console.test_pages import PAGES, prepared, shared  # noqa: F401

pytestmark = pytest.mark.ui

STREAMLITS_OWN: set[str] = set()
"""Rules that an empty page of Streamlit does not keep."""


def serious(page):
    """Return axe-core's serious and critical findings: rule -> the elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return {
        one["id"]: [node["html"][:200] for node in one["nodes"]]
        for one in found
        if one["impact"] in {"serious", "critical"}
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_finding_of_its_own(shared, browser, theme):  # noqa: F811
    console = OpenConsole(browser, shared, theme=theme)
    found = {}
    for title in PAGES:
        console.open(title)
        found |= {
            (title, rule): elements for rule, elements in serious(console.page).items() if rule not in STREAMLITS_OWN
        }
    console.close()
    assert found == {}


def test_what_is_streamlits_own_is_on_an_empty_page(browser, tmp_path):
    process, url = start_empty_page(tmp_path)
    try:
        empty = OpenConsole(browser, url)
        assert set(serious(empty.page)) == STREAMLITS_OWN
        empty.close()
    finally:
        process.terminate()
        process.wait(20)
