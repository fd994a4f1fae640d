"""Uploading a version to the Hub: a double of its HTTP API, as far as that is documented, on loopback."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.deployment.target import TargetError
from finetune_pipeline.pipeline.push_model import push_model
from finetune_pipeline.settings import home

TOKEN = "hf_thisIsTheTokenOfTheTests"


class Hub(ThreadingHTTPServer):
    """Repositories with files; large ones arrive by Git LFS."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private, self.files, self.blobs, self.commits, self.fault = {}, {}, {}, [], None

    def answer(self, method, path, content):
        body = json.loads(content) if content[:1] == b"{" and "/commit/" not in path else {}
        if path == "/api/repos/create":
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            if name in self.private:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.private[name], self.files[name] = body.get("private") or body.get("visibility") == "private", {}
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}} for one in body["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT":
            self.blobs[hashlib.sha256(content).hexdigest()] = content
            return 200, {}
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.private:
            return 404, {"error": "Repository not found"}
        if rest[:1] == ["preupload"]:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".gguf") else "regular",
                    "shouldIgnore": False,
                }
                for one in body["files"]
            ]
            return 200, {"files": modes}
        if rest[:1] == ["commit"]:
            self.commit(repo, [json.loads(line) for line in content.splitlines()])
            return 200, {
                "commitUrl": f"{self.url}/{repo}/commit/1",
                "commitOid": "1",
                "hookOutput": "",
                "success": True,
            }
        if rest[:1] == ["tree"]:
            return 200, [{"type": "file", "path": path, "oid": "0", "size": 1} for path in self.files[repo]]
        siblings = [{"rfilename": path} for path in self.files[repo]]
        return 200, {"id": repo, "private": self.private[repo], "siblings": siblings, "sha": "0" * 40, "tags": []}

    def commit(self, repo, lines):
        self.commits.append(lines[0]["value"]["summary"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                self.files[repo].pop(value["path"])


class _Handler(BaseHTTPRequestHandler):
    def answer(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.server.fault == "reset":
            self.close_connection = True
            return
        if self.server.fault:
            status, value = self.server.fault
        elif path.startswith("/api/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status, value = 401, {"error": f"Invalid credentials {self.headers['Authorization']}"}
        else:
            status, value = self.server.answer(self.command, path, content)
        answer = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        if status >= 400:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # huggingface_hub reads HF_ENDPOINT and the like once, at its import.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def test_exactly_the_layout_is_uploaded_to_a_private_repository(hub, loop, promoted):
    promoted("one")
    told = []
    url = push_model(loop, "v1.0.0", "me/notes", told.append)
    assert url == f"{hub.url}/me/notes/commit/1" and hub.private == {"me/notes": True}
    files = hub.files["me/notes"]
    assert set(files) == {"README.md", "manifest.json", "notes-v1.0.0.gguf", "tokenizer.model", "tokenizer_config.json"}
    manifest = json.loads(files["manifest.json"])
    for name, file in manifest["files"].items():
        assert hashlib.sha256(files[name]).hexdigest() == file["sha256"]
    assert files["notes-v1.0.0.gguf"] == b"one" and hub.commits == ["Upload notes@v1.0.0"]
    assert [*(home() / "cache" / "push").iterdir()] == []
    hub.files["me/notes"]["mine.txt"] = b"a file of the user"
    promoted("two")
    push_model(loop, "champion", "me/notes", told.append)
    names = {name for name in hub.files["me/notes"] if not name.startswith("token")}
    assert names == {"README.md", "manifest.json", "notes-v1.1.0.gguf", "mine.txt"}


def test_nothing_is_uploaded_into_a_public_repository_unless_told(hub, loop, promoted):
    promoted("one")
    hub.private["me/open"], hub.files["me/open"] = False, {}
    with pytest.raises(TargetError, match=r"me/open is public, .*nothing was uploaded. Give --public"):
        push_model(loop, "v1.0.0", "me/open", print)
    assert hub.files["me/open"] == {}
    push_model(loop, "v1.0.0", "me/open", print, public=True)
    assert hub.files["me/open"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, {"error": "Invalid user token"}), "status 401, .*the token is not valid; set HF_TOKEN"),
        ((403, {"error": "You don't have the rights"}), "status 403, .*the token has no right to write to me/notes"),
        ((429, {"error": "Too many"}), "status 429"),
        ("reset", "cannot be reached"),
    ],
)
def test_errors_of_the_hub_are_plain_words_without_the_token(hub, loop, promoted, fault, message, monkeypatch):
    promoted("one")
    hub.fault = fault
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own tries
    with pytest.raises(TargetError, match=message) as caught:
        push_model(loop, "v1.0.0", "me/notes", print)
    assert TOKEN not in str(caught.value) and hub.files == {}


def test_a_missing_token_and_a_wrong_name_are_told(hub, loop, promoted, monkeypatch, own_home):
    promoted("one")
    with pytest.raises(TargetError, match=r"a/b/c is no name of a repository .*expected owner/name"):
        push_model(loop, "v1.0.0", "a/b/c", print)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(own_home / "no_token"))
    with pytest.raises(TargetError, match="no token of the Hugging Face Hub was found; set HF_TOKEN, or log in"):
        push_model(loop, "v1.0.0", "me/notes", print)


def test_the_command_prints_the_commit_and_never_the_token(hub, loop, promoted, tmp_path, monkeypatch):
    promoted("one")
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
    done = CliRunner().invoke(finetune, ["model", "push", "v1.0.0", "me/notes", "--loop", "notes"])
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/me/notes/commit/1" in done.output and "upload notes@v1.0.0 to me/notes" in done.output
    assert TOKEN not in done.output
