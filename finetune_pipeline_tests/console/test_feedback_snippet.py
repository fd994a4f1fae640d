"""`examples/feedback.html` in a real browser, against a real gateway: thumbs, an edit, and errors as sentences."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.conftest import uid
from finetune_pipeline_tests.serving.conftest import make_loop, serving

pytestmark = pytest.mark.ui

SNIPPET = PROJECT_ROOT / "examples" / "feedback.html"
SCHEMA = PROJECT_ROOT / "data" / "benchmarks" / "aec_parser.schema.json"


class Page(BaseHTTPRequestHandler):
    """The user's own page, from another port of this machine."""

    def __init__(self, text, *arguments):
        self.text = text
        super().__init__(*arguments)

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_arguments):
        pass


def test_a_page_of_the_user_gives_feedback(browser, own_home):
    with serving(make_loop(output_schema=str(SCHEMA))) as gateway:
        logged = {"loop": "notes", "id": str(uid("one")), "prompt": "a wall", "output": '{"element":"wall"}'}
        assert gateway.http.post("/v1/interactions", json=logged).status_code in {200, 202}
        text = SNIPPET.read_text(encoding="utf-8").replace("http://127.0.0.1:8484", gateway.url)
        text = text.replace("00000000-0000-4000-8000-000000000000", str(uid("one")))
        text = text.replace("The answer of the model", logged["output"])
        site = ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, text))
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page = browser.new_page()
        try:
            page.goto(f"http://127.0.0.1:{site.server_port}")
            page.get_by_role("button", name="Good").click()
            page.get_by_text("Thank you.").wait_for()
            page.get_by_role("button", name="Edit").click()
            page.keyboard.press("Control+A")
            page.keyboard.type("not JSON")
            page.get_by_role("button", name="Save").click()
            page.get_by_text("could not train").wait_for()  # the gateway's own sentence
            page.locator(".answer").click()
            page.keyboard.press("Control+A")
            page.keyboard.type('{"element":"wall","material":"brick"}')
            page.get_by_role("button", name="Save").click()
            page.get_by_text("Thank you.").wait_for()
            given = [(one["kind"], one["user"]) for one in gateway.interaction(str(uid("one")))["feedback"]]
            assert given == [("thumbs_up", "u1"), ("correction", "u1")]
        finally:
            page.close()
            site.shutdown()
        page = browser.new_page()
        page.set_content(text.replace(gateway.url, "http://127.0.0.1:9"))
        page.get_by_role("button", name="Bad").click()
        page.get_by_text("The gateway does not answer.").wait_for()
        page.close()
