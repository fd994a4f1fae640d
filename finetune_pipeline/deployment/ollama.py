"""An Ollama server: a release is one of its models, and the name that applications ask for is a copy of that.

The GGUF is uploaded as a blob under its SHA-256, and a model is made of it by /api/create. Ollama has no aliases: the
name with the tag `latest` gets a copy of the release's manifest, so both names have one digest and share the weights.
Whoever moves `latest` by hand is noticed by that digest.

Ollama reports an error as a line of a response with status 200, logs and ignores unknown parameters, and may render
prompts by a template of its own. So this module accepts success only by the stream's last line, refuses parameters that
it does not know, and compares rendered prompts with the tokenizer's.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment.go_template import go_template, rendered_examples
from finetune_pipeline.deployment.target import BASE, Observed, Release, TargetError, TargetRefused
from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.protocol import END_TOKENS
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.records import Message
from finetune_pipeline.settings import OllamaTarget, UpstreamSettings
from finetune_pipeline.validation_messages import nearest, short_repr

if TYPE_CHECKING:
    import httpx

ALIAS = "latest"
"""Tag of the name that applications ask for; `notes` means `notes:latest`."""

REPLACED = "replaced-by-finetune"
"""Tag under which a model stays that had the applications' name, was no release, and had no other name."""

_OLDEST = (0, 5, 5)
"""Version since which /api/create makes a model of uploaded files."""

_FILE = "model.gguf"
_CHUNK = 1 << 20
_RELEASE = re.compile(rf"v\d+\.\d+\.\d+|{BASE}|[0-9a-f]{{16}}")
_QUOTED_CHARACTERS = 300

PARAMETERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("num_ctx", "num_predict", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"),
        (int,),
    ),
    **dict.fromkeys(("seed", "top_k", "repeat_last_n"), (int,)),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"), (int, float)
    ),
    "use_mmap": (bool,),
    "stop": (list,),
}
"""Parameters of a model that Ollama applies, with their types; it ignores all others, so these are refused."""


class Ollama:
    """An Ollama server as a deployment target; see `deployment.target.Target`."""

    wants_merged_folder = False

    def __init__(self, settings: OllamaTarget, loop: str) -> None:
        self.name = settings.key
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._model = settings.model or loop

    def check_config(self, release: Release) -> None:
        """Raise TargetRefused for a parameter that Ollama does not have."""
        check_parameters(release.config)

    def observe(self, release: Release) -> Observed:
        """Return the release whose digest the applications' name has, and check that its GGUF is the release's."""
        self._check_server()
        digests = self._digests()
        active = digests.get(ALIAS)
        if active is None:
            return Observed(None, detail=f"{self._url} has no model {self._model}:{ALIAS}")
        labels = [tag for tag, digest in digests.items() if digest == active and _RELEASE.fullmatch(tag)]
        short = active.removeprefix("sha256:")[:12]
        if release.label not in labels:
            found = f"is {labels[0]}" if labels else "is no release of this loop"
            return Observed(next(iter(labels), None), active, f"{self._model}:{ALIAS} ({short}) {found}")
        blob = _blob_of(self._show(ALIAS) or {})
        if blob != release.gguf_sha256:
            detail = (
                f"{self._model}:{ALIAS} ({short}) has the name of {release.label}, but its GGUF is {blob[:12]} instead "
                f"of {release.gguf_sha256[:12]}"
            )
            return Observed(None, active, detail)
        return Observed(release.label, active, f"{self._model}:{ALIAS} ({short}) is {release.label}")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Upload the GGUF, make a model of it under the release's label, and check the prompts that it gets."""
        if release.adapter_gguf is not None:
            raise TargetRefused(
                f"Ollama refuses LoRA adapters since 0.34.1, and {release.name} is a base with an adapter; set "
                "export.form: merged and train again, or remove the target"
            )
        tokenizer = load_tokenizer(release.base_folder)
        parameters = model_parameters(release, tokenizer)
        self._check_server()
        if not self._has(release, parameters):
            self._upload(release)
            self._create(release, parameters)
        self._check_prompts(release, parameters, tokenizer)
        return UpstreamSettings(
            url=f"{self._url}/v1",
            model=f"{self._model}:{release.label}",
            api_key_env=self._settings.api_key_env,
            timeout_seconds=self._settings.timeout_seconds,
        )

    def activate(self, release: Release) -> None:
        """Copy the release to the applications' name. A model there that has no other name is kept under one."""
        digests = self._digests()
        replaced = digests.get(ALIAS)
        if replaced is not None and replaced not in (digests[tag] for tag in digests.keys() - {ALIAS}):
            self._copy(ALIAS, REPLACED)
        self._copy(release.label, ALIAS)
        digests = self._digests()
        if digests.get(ALIAS) is None or digests.get(ALIAS) != digests.get(release.label):
            listed = " and ".join(digests.get(tag, "no such model") for tag in (ALIAS, release.label))
            raise TargetError(
                f"{self._url} answered that {self._model}:{release.label} was copied to {self._model}:{ALIAS}, but "
                f"/api/tags lists {listed}; it is tried again"
            )

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Remove the loop's other releases, never the active one nor a model with a tag that is no release's."""
        digests = self._digests()
        removed = []
        for label in sorted(digests):
            # A name with the active digest may stay: it costs no space, since the server keeps one file for both.
            if not _RELEASE.fullmatch(label) or label in keep or digests[label] == digests.get(ALIAS):
                continue
            response = self._send("DELETE", "/api/delete", {"model": f"{self._model}:{label}"})
            if response.status_code not in (200, 404):
                raise self._unexpected(f"delete {self._model}:{label}", response)
            removed.append(label)
        return removed

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return None: Ollama has no endpoint for tokens. `stage` compares the rendered text instead."""
        return None

    def start_command(self, release: Release) -> str | None:
        """Return None: the server needs no restart."""
        return None

    def _has(self, release: Release, parameters: Mapping[str, Any]) -> bool:
        """Return whether the server has the release's model with this content, such as after a kill."""
        shown = self._show(release.label)
        return (
            shown is not None
            and _blob_of(shown) == release.gguf_sha256
            and shown.get("system", "") == release.system_prompt
            and _parameters_of(shown) == _pairs(parameters)
        )

    def _upload(self, release: Release) -> None:
        """Send the GGUF, unless the server has a blob with its digest.

        Raises:
            TargetRefused: the file is not the evaluated one; nothing was sent.
            TargetError: the server did not store it.
        """
        digest = f"sha256:{release.gguf_sha256}"
        response = self._send("HEAD", f"/api/blobs/{digest}")
        if response.status_code == 200:
            return
        if response.status_code != 404:
            raise self._unexpected("look for the GGUF", response)
        found = hash_file(release.gguf)
        if found != release.gguf_sha256:
            raise TargetRefused(
                f"{release.gguf} is damaged or was replaced: its SHA-256 is {found[:16]}..., expected "
                f"{release.gguf_sha256[:16]}... of the evaluated file; nothing was sent. Restore it, or train again"
            )
        size = {"Content-Length": str(release.gguf.stat().st_size)}
        with self._answers("POST", f"/api/blobs/{digest}"), self._client() as client:
            response = client.post(f"/api/blobs/{digest}", content=_chunks(release.gguf), headers=size)
        if response.status_code not in (200, 201):
            raise self._unexpected(f"store the GGUF ({release.gguf.stat().st_size / 1e6:,.0f} MB)", response)

    def _create(self, release: Release, parameters: Mapping[str, Any], template: str | None = None) -> None:
        """Make the release's model of the uploaded GGUF; only the stream's last line says whether that worked."""
        body: dict[str, Any] = {
            "model": f"{self._model}:{release.label}",
            "files": {_FILE: f"sha256:{release.gguf_sha256}"},
            "system": release.system_prompt,
            "parameters": dict(parameters),
        }
        if template is not None:
            # With a parser, even this one that leaves answers as they are, the GGUF's own template is never preferred.
            body |= {"template": template, "parser": "passthrough"}
        response = self._send("POST", "/api/create", body)
        if response.status_code != 200:
            raise self._unexpected(f"create {body['model']}", response)
        last: dict[str, Any] = {}
        for line in filter(None, response.text.split("\n")):
            last = self._object(line, "/api/create")
            if "error" in last:
                raise TargetError(f"{self._url} cannot create {body['model']}: {last['error']}")
        if last.get("status") != "success":
            raise TargetError(
                f"{self._url} began to create {body['model']}, but its response ended with {short_repr(last)} instead "
                "of success; see the server's log"
            )
        blob = _blob_of(self._show(release.label) or {})
        if blob != release.gguf_sha256:
            raise TargetError(
                f"{self._url} says that it created {body['model']}, but that has the GGUF {blob[:16] or 'none'} "
                f"instead of {release.gguf_sha256[:16]}; see the server's log"
            )

    def _check_prompts(self, release: Release, parameters: Mapping[str, Any], tokenizer: Any) -> None:
        """Compare the server's prompts with the tokenizer's; if they differ, try a template made for the loop's shape.

        A server without debug rendering cannot be asked. Then only the answers are compared, by the caller.

        Raises:
            TargetRefused: the server renders other prompts than the tokenizer; the message shows both.
        """
        render = tokenizer_chat_template(tokenizer).render
        examples = rendered_examples(lambda messages: render(messages).text, release.system_prompt)
        bos = (tokenizer.bos_token or "") if _adds_bos(release.gguf) else ""  # then it may be missing in the text
        differing = self._differing_prompt(release, examples, bos)
        if differing is None:
            return
        try:
            template = go_template(lambda messages: render(messages).text, bos)
        except RequestRefused as error:
            raise TargetRefused(
                f"{self._url} renders the prompt {differing[1]!r} for {release.name}, the tokenizer renders "
                f"{differing[0]!r}, and {error}; use llama_server or vllm for this base model"
            ) from error
        self._create(release, parameters, template)
        again = self._differing_prompt(release, examples, bos)
        if again is not None:
            expected, found = again
            raise TargetRefused(
                f"{self._url} renders prompts for {release.name} in another way than the tokenizer, with its own "
                f"template ({differing[1]!r}) and with one that was made for it ({found!r}); the tokenizer renders "
                f"{expected!r}. So its answers would be of another model; use llama_server or vllm for this base model"
            )

    def _differing_prompt(
        self, release: Release, examples: list[tuple[list[Message], str]], bos: str
    ) -> tuple[str, str] | None:
        """Return the first expected prompt that the server renders differently, and how; None if there is none."""
        for messages, expected in examples:
            found = self._rendered(release, messages)
            if found is None:
                return None
            if bos:
                expected, found = expected.removeprefix(bos), found.removeprefix(bos)
            if found != expected:
                return expected, found
        return None

    def _rendered(self, release: Release, messages: list[Message]) -> str | None:
        """Return the prompt that the server makes of messages; None if it has no debug rendering and answered them."""
        body = {
            "model": f"{self._model}:{release.label}",
            "messages": messages,
            "stream": False,
            "_debug_render_only": True,
            "options": {"num_predict": 1},
        }
        response = self._send("POST", "/api/chat", body)
        if response.status_code != 200:
            raise self._unexpected(f"load {body['model']}", response)
        info = self._object(response.text, "/api/chat").get("_debug_info")
        text = info.get("rendered_template") if isinstance(info, dict) else None
        return text if isinstance(text, str) else None

    def _copy(self, source: str, destination: str) -> None:
        names = {"source": f"{self._model}:{source}", "destination": f"{self._model}:{destination}"}
        response = self._send("POST", "/api/copy", names)
        if response.status_code != 200:
            raise self._unexpected(f"copy {names['source']} to {names['destination']}", response)

    def _check_server(self) -> None:
        """Raise a TargetError unless the URL is an Ollama server that can make models of uploaded files."""
        response = self._send("GET", "/api/version")
        try:
            version = response.json()["version"]
        except (ValueError, LookupError, TypeError):
            raise TargetError(
                f"{self._url} is not an Ollama server: GET /api/version was answered by status "
                f"{response.status_code} and {short_repr(response.text)}; correct the target's url (without /v1)"
            ) from None
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
        found = tuple(map(int, numbers.groups())) if numbers else (0, 0, 0)
        if (0, 0, 0) < found < _OLDEST:  # a development build says 0.0.0
            raise TargetError(
                f"{self._url} is Ollama {version}; expected at least {'.'.join(map(str, _OLDEST))}, which makes models "
                "of uploaded files. Update it"
            )

    def _digests(self) -> dict[str, str]:
        """Return the digest of each tag of the model; two tags with one digest are the same model."""
        response = self._send("GET", "/api/tags")
        if response.status_code != 200:
            raise self._unexpected("list its models", response)
        found = {}
        for one in self._object(response.text, "/api/tags").get("models") or []:
            name, _, tag = str(one.get("name", "")).rpartition(":")
            if name.lower() in {self._model, self._model.removeprefix("library/")}:
                found[tag] = str(one.get("digest", ""))
        return found

    def _show(self, tag: str) -> dict[str, Any] | None:
        """Return what the server says about a model; None if it has no such model."""
        response = self._send("POST", "/api/show", {"model": f"{self._model}:{tag}"})
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise self._unexpected(f"show {self._model}:{tag}", response)
        return self._object(response.text, "/api/show")

    def _object(self, text: str, path: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise TargetError(
                f"{self._url} answered {path} with something else than a JSON object: {short_repr(text)}; correct the "
                "target's url, or see the server's log"
            )
        return value

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> "httpx.Response":
        with self._answers(method, path), self._client() as client:
            return client.request(method, path, json=body)

    def _client(self) -> "httpx.Client":
        import httpx

        headers = {}
        if self._settings.api_key_env is not None:
            key = os.environ.get(self._settings.api_key_env)
            if not key:
                raise TargetError(
                    f"the environment variable {self._settings.api_key_env} is not set; set it to the API key of "
                    f"{self._url}"
                )
            headers["Authorization"] = f"Bearer {key}"
        seconds = self._settings.timeout_seconds
        return httpx.Client(
            base_url=self._url, headers=headers, timeout=httpx.Timeout(seconds, connect=min(5.0, seconds))
        )

    @contextmanager
    def _answers(self, method: str, path: str) -> Iterator[None]:
        """Turn the errors of a connection into a TargetError."""
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise TargetError(
                f"{self._url} did not answer {method} {path} within {self._settings.timeout_seconds:g} s; start it, or "
                "raise the target's timeout_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise TargetError(
                f"{self._url} cannot be reached, or broke off during {method} {path} ({type(error).__name__}: {error})"
                "; start it, or correct the target's url"
            ) from error

    def _unexpected(self, what: str, response: "httpx.Response") -> TargetError:
        try:
            said = response.json()["error"]
        except (ValueError, LookupError, TypeError):
            said = response.text.strip() or "nothing else"
        return TargetError(
            f"{self._url} cannot {what}: status {response.status_code}, {short_repr(said, _QUOTED_CHARACTERS)}; see "
            "the server's log"
        )


def model_parameters(release: Release, tokenizer: Any) -> dict[str, Any]:
    """Return the parameters of a release's model, as a Modelfile has them.

    Ollama's own defaults would break what was judged: a context of 4,096 tokens, temperature 0.8 and, in older
    versions, a repeat penalty of 1.1.

    Args:
        tokenizer: of the base model, in transformers.

    Raises:
        TargetRefused: `Release.config` has a parameter that Ollama does not apply, or a value of another type.
    """
    check_parameters(release.config)
    try:
        ends = _end_texts(release, tokenizer)
    except RequestRefused as error:
        raise TargetRefused(f"{release.name} cannot be served by Ollama: {error}") from error
    defaults = {
        "num_ctx": release.context,
        "num_predict": release.max_tokens,
        "temperature": 0,
        "repeat_penalty": 1,
        "stop": ends,
    }
    return {**defaults, **release.config}


def check_parameters(config: Mapping[str, Any]) -> None:
    """Raise an error unless Ollama applies all of these settings.

    Raises:
        TargetRefused: Ollama has no such parameter, or it expects a value of another type.
    """
    for name, value in config.items():
        expected = PARAMETERS.get(name)
        if expected is None:
            meant = nearest(name, PARAMETERS)
            raise TargetRefused(
                f"deploy.config: Ollama has no parameter {name} and would ignore it; "
                f"{f'did you mean {meant}? ' if meant else ''}It has: {', '.join(sorted(PARAMETERS))}"
            )
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if (
            not isinstance(value, expected)
            or isinstance(value, bool) != (bool in expected)
            or (list in expected and not texts)
        ):
            wanted = {int: "an integer", float: "a number", bool: "true or false", list: "a list of texts"}[
                expected[-1]
            ]
            raise TargetRefused(f"deploy.config: {name} is {value!r}; Ollama expects {wanted}")


def _end_texts(release: Release, tokenizer: Any) -> list[str]:
    """Return the texts at which generation ends: the template's, and further ones that only our engine knows.

    Raises:
        RequestRefused: the template writes no end token.
    """
    listed = filter(None, str(_metadata(release.gguf, END_TOKENS) or "").split(","))
    ids = dict.fromkeys([tokenizer_chat_template(tokenizer).end_token(), *map(int, listed)])
    texts: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    return texts


def _adds_bos(gguf: Path) -> bool:
    """Return whether llama.cpp puts the beginning-of-sequence token before a text, so that templates need not."""
    flag = _metadata(gguf, "tokenizer.ggml.add_bos_token")
    return bool(_metadata(gguf, "tokenizer.ggml.model") == "llama" if flag is None else flag)  # llama: SentencePiece


def _metadata(gguf: Path, key: str) -> Any:
    """Return a value of a GGUF's metadata; None without it, and for a damaged file, which the server refuses."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(gguf).fields.get(key)
        return field.contents() if field else None
    except Exception:  # the reader raises anything
        return None


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _blob_of(shown: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a model's GGUF, which its Modelfile names as a path of the server; empty if it has none."""
    found = re.search(r"^FROM .*sha256[-:]([0-9a-f]{64})", str(shown.get("modelfile", "")), re.MULTILINE)
    return found[1] if found else ""


def _parameters_of(shown: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Return the parameters of /api/show, which lists one a line with its value in Go's syntax."""
    pairs = []
    for line in filter(None, str(shown.get("parameters", "")).split("\n")):
        name, _, value = line.partition(" ")
        try:
            pairs.append((name, _canonical(json.loads(value))))
        except ValueError:
            return None  # then the model is made again, which costs nothing
    return sorted(pairs)


def _pairs(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted(
        (name, _canonical(one))
        for name, value in parameters.items()
        for one in (value if isinstance(value, list) else [value])
    )


def _canonical(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(float(value)) if number else repr(value)
