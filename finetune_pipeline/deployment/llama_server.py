"""A llama-server of llama.cpp, in one of two forms.

Router: the server is started without a model and reads `presets.ini` in its models folder. Each release is a file and a
section of its own there, `loop@v1.2.0`; applications ask for the section with the loop's name, which names the file of
the active release. The server reads the file again when it is told to, and restarts the processes whose section
changed.

Adapters: the server is started with one base model and some LoRA adapters. It cannot load further ones while it runs,
so a new release needs a restart with the printed command. Switching between loaded ones is a change of their scales.
"""

import json
import re
import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from finetune_pipeline.artifacts import hash_file, hash_file_cached, model_sha256, write_text
from finetune_pipeline.deployment.connection import AnsweredError, Connection
from finetune_pipeline.deployment.files import PART, put_file, writing
from finetune_pipeline.deployment.target import BASE, Observed, Release, TargetError, TargetRefused
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Message
from finetune_pipeline.settings import LlamaServerTarget, UpstreamSettings
from finetune_pipeline.validation_messages import nearest, short_repr

PRESETS = "presets.ini"
"""File in the models folder with one section for each model of the router."""

_HEADER = "; finetune writes its loops' sections and leaves others alone\n\n"

LOAD_SECONDS = 600.0
"""How long a router may take to load a model."""

DRAIN_SECONDS = 10.0
"""How long a switch waits for a moment in which the router answers no request under the loop's name."""

_POLL_SECONDS = 0.1
_LABEL = rf"v\d+\.\d+\.\d+|{BASE}|[0-9a-f]{{16}}"
_SECTION = re.compile(r"^[ \t]*\[[ \t]*([^\]\n]*?)[ \t]*\].*$", re.MULTILINE)
_REFUSING_TEMPLATE = "Jinja Exception"
"""By this the server says, with status 500, that its chat template called raise_exception."""

OPTIONS: dict[str, type] = {
    **dict.fromkeys(
        ("ctx-size", "parallel", "threads", "threads-batch", "threads-http", "batch-size", "ubatch-size",
         "n-gpu-layers", "main-gpu", "n-cpu-moe", "n-predict", "keep", "cache-ram", "cache-reuse",
         "ctx-checkpoints", "prio", "poll", "timeout", "seed", "top-k", "repeat-last-n", "reasoning-budget"), int,
    ),
    **dict.fromkeys(
        ("temperature", "top-p", "min-p", "typical-p", "repeat-penalty", "presence-penalty", "frequency-penalty",
         "rope-scale", "rope-freq-base", "rope-freq-scale"), float,
    ),
    **dict.fromkeys(
        ("kv-unified", "kv-offload", "op-offload", "cont-batching", "context-shift", "cache-prompt", "warmup", "jinja",
         "repack", "slots"), bool,
    ),
    **dict.fromkeys(
        ("flash-attn", "cache-type-k", "cache-type-v", "split-mode", "tensor-split", "device", "override-tensor",
         "numa", "load-mode", "rope-scaling", "samplers", "chat-template", "chat-template-file", "reasoning-format",
         "reasoning"), str,
    ),
}  # fmt: skip
"""Options of llama-server that `deploy.config` may set, by their long names, with the type of their value."""

_OTHER_NAMES = {
    "n-ctx": "ctx-size", "gpu-layers": "n-gpu-layers", "n-parallel": "parallel", "predict": "n-predict",
    "temp": "temperature", "typical": "typical-p",
}  # fmt: skip


def open_llama_server(settings: LlamaServerTarget, loop: str) -> "LlamaRouter | LlamaAdapters":
    """Return the target of the form that its settings have."""
    return (LlamaRouter if settings.form == "router" else LlamaAdapters)(settings, loop)


class _LlamaServer:
    """What both forms share; see `deployment.target.Target` for the methods."""

    wants_merged_folder = False

    def __init__(self, settings: LlamaServerTarget, loop: str) -> None:
        self.name = settings.key
        self._settings = settings
        self._loop = loop
        self._folder = Path(settings.folder)
        self._server = Connection(settings)

    def check_config(self, release: Release) -> None:
        """Raise TargetRefused for an option that llama-server does not have."""
        server_options(release, for_ini=self._settings.form == "router")

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return the token ids of a conversation, by the two endpoints that use what the server's chat uses itself.

        The server's chat adds the beginning-of-sequence token when it tokenizes, and so removes one that the template
        wrote; /apply-template removes it too, so /tokenize has to add it.
        """
        model = {"model": release.name}
        try:
            prompt = self._server.post("/apply-template", {**model, "messages": messages})["prompt"]
        except AnsweredError as error:
            if error.status == 400 or _REFUSING_TEMPLATE in error.said:
                raise RequestRefused(error.said) from error
            raise
        body = {**model, "content": prompt, "add_special": True, "parse_special": True}
        return [int(token) for token in self._server.post("/tokenize", body)["tokens"]]

    def _endpoint(self, model: str, **fields: Any) -> UpstreamSettings:
        return UpstreamSettings(
            url=f"{self._server.url}/v1",
            model=model,
            api_key_env=self._settings.api_key_env,
            timeout_seconds=self._settings.timeout_seconds,
            **fields,
        )

    def _put(self, source: Path, sha256: str, label: str, suffix: str) -> Path:
        return put_file(source, sha256, self._folder.absolute(), f"{self._loop}-{label}", suffix)

    def _files(self, suffix: str, labels: str = _LABEL) -> Iterator[tuple[Path, str]]:
        """Yield the loop's files in the folder with the labels in their names, oldest first."""
        pattern = re.compile(rf"{re.escape(self._loop)}-({labels})(?:-\d+)?{re.escape(suffix)}")
        named = ((path, pattern.fullmatch(path.name)) for path in self._folder.absolute().glob(f"*{suffix}"))
        for path, match in sorted(named, key=lambda one: one[0].stat().st_mtime):
            if match:
                yield path, match[1]

    def _remove_parts(self) -> None:
        """Remove what killed processes left; the caller holds the target's lease, so nobody writes them now."""
        for path in self._folder.glob(f".{self._loop}-*{PART}"):
            path.unlink(missing_ok=True)

    def _command(self, options: Mapping[str, Any]) -> str:
        """Return the command that starts a server at the target's URL with these options."""
        parts = urlsplit(self._settings.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        words = ["llama-server"]
        for name, value in {**options, "host": parts.hostname or "127.0.0.1", "port": port}.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", str(value)]
        return shlex.join(words)


class LlamaRouter(_LlamaServer):
    """A llama-server in router mode."""

    def observe(self, release: Release) -> Observed:
        """Return the release whose files the model with the loop's name has; their content is checked by hash."""
        model = self._models().get(self._loop)
        if model is None:
            return Observed(None, detail=f"{self._server.url} has no model {self._loop}")
        files = self._files_of(model)
        if model["status"].get("failed"):
            code = model["status"].get("exit_code")
            return Observed(None, detail=f"{self._loop} cannot be loaded, exit status {code}")
        try:
            digest = _digest(*files)
        except OSError as error:
            return Observed(None, detail=f"the model {self._loop} has a file that cannot be read here: {error}")
        label = next((label for path, label in self._files(".gguf") if path == files[0]), None)
        if label != release.label:
            return Observed(label, digest, f"{self._loop} has the file {files[0]}")
        if digest != release.sha256:
            return Observed(None, digest, f"{files[0]} has not the content of {release.label}, but {digest[:16]}")
        if self._sections().get(self._loop) != self._section(self._loop, files, self._options(release)):
            return Observed(None, digest, f"the section [{self._loop}] of {self._presets} was changed")
        return Observed(label, digest, f"{self._loop} has the file {files[0]}")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Put the release's files and a section of its own into the folder, and let the router load it."""
        options, files = self._options(release), self._put_files(release)
        self._write_section(release.name, self._section(release.name, files, options))
        try:
            models = self._reload()
        except AnsweredError:
            self._write_section(release.name, "")  # otherwise the router could not start again
            raise
        if release.name not in models or self._files_of(models[release.name])[0] != files[0]:
            raise TargetError(
                f"{self._server.url} does not read {self._presets}: after a reload it has "
                f"{', '.join(models) or 'no models'}. Restart it with: {self._router_command()}"
            )
        self._load(release.name)
        return self._endpoint(release.name)

    def activate(self, release: Release) -> UpstreamSettings:
        """Let the loop's section name the release's files, and restart the router's process of that name.

        Under the name of its own, the release would be loaded a second time.
        """
        files = self._put_files(release)
        self._wait_until_idle()
        self._write_section(self._loop, self._section(self._loop, files, self._options(release)))
        self._reload()
        self._load(self._loop)
        self._unload(release.name)  # it stays under its own name, and is loaded again if somebody asks for it
        return self._endpoint(self._loop)

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Remove sections and files of the loop's other releases."""
        names = [name for name in self._sections() if name.startswith(f"{self._loop}@")]
        old = [name for name in names if name.partition("@")[2] not in keep]
        if old:
            for name in old:
                self._write_section(name, "")
            self._reload()
        text = "".join(self._sections().values())
        for suffix in (".gguf", ".lora"):
            for path, _ in [*self._files(suffix)]:
                if f" {path}\n" not in text:
                    path.unlink(missing_ok=True)
        self._remove_parts()
        return [name.partition("@")[2] for name in old]

    def start_command(self, release: Release) -> str | None:
        """Return None: a router that reads the folder needs no restart."""
        return None

    def _router_command(self) -> str:
        return self._command({"models-preset": self._presets})

    @property
    def _presets(self) -> Path:
        return self._folder.absolute() / PRESETS

    def _options(self, release: Release) -> dict[str, Any]:
        return server_options(release, for_ini=True)

    def _put_files(self, release: Release) -> tuple[Path, ...]:
        """Return the release's GGUF and adapter in the folder."""
        gguf = self._put(release.gguf, release.gguf_sha256, release.label, ".gguf")
        if release.adapter_gguf is None:
            return (gguf,)
        return gguf, self._put(release.adapter_gguf, _adapter_sha256(release), release.label, ".lora")

    def _section(self, name: str, files: tuple[Path, ...], options: Mapping[str, Any]) -> str:
        # A process that is to end never completes its requests; by default it is killed after 10 s.
        lines = [f"[{name}]", "stop-timeout = 1", f"model = {files[0]}", *(f"lora = {path}" for path in files[1:])]
        for key, value in options.items():
            lines.append(f"{key} = {json.dumps(value) if isinstance(value, bool) else value}")
        return "\n".join(lines) + "\n\n"

    def _sections(self) -> dict[str, str]:
        """Return the text of each section by its name; the text before the first has the empty name."""
        try:
            text = self._presets.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        starts = [*_SECTION.finditer(text)]
        ends = [*(one.start() for one in starts[1:]), len(text)]
        found = {"": text[: starts[0].start() if starts else None]}
        return found | {one[1]: text[one.start() : end] for one, end in zip(starts, ends, strict=False)}

    def _write_section(self, name: str, section: str) -> None:
        """Replace one section of the file, which other loops and the user have sections in too."""
        with writing(self._folder), FileLock(f"{self._presets}.lock"):
            sections = self._sections() or {"": _HEADER}
            if self._presets.exists() and sections.get(name, "") == section:
                return
            sections[name] = section
            before = [text if text.endswith("\n") else f"{text}\n" for text in sections.values() if text]
            write_text(self._presets, "".join(before))

    def _reload(self) -> dict[str, dict[str, Any]]:
        """Let the router read its file again, and return its models.

        Raises:
            TargetError: it does not answer, or refuses the file.
        """
        known = self._models()
        for name, model in known.items():
            # The router stops at a name that is another model's alias, and then never loads a model again.
            ours = [alias for alias in model.get("aliases") or () if alias in self._sections() and alias != name]
            if ours:
                raise TargetError(
                    f"the model {name} of {self._server.url} has the alias {ours[0]}, under which this loop is "
                    "deployed; remove the alias there and restart the server"
                )
        return self._models({"reload": "1"})

    def _models(self, query: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
        try:
            listed = self._server.get("/models", query)
            models = {str(one["id"]): dict(one) for one in listed["data"]}
            if all("value" in one["status"] for one in models.values()):
                return models
        except AnsweredError:
            raise
        except TargetError as error:
            self._write_section("", self._sections().get("") or _HEADER)  # without the file, the router does not start
            raise TargetError(f"{error}. Its start command: {self._router_command()}") from error
        except (KeyError, TypeError, ValueError):
            pass
        raise TargetError(
            f"{self._server.url} is no llama-server in router mode; start one with: {self._router_command()}"
        )

    def _files_of(self, model: Mapping[str, Any]) -> tuple[Path, ...]:
        """Return the GGUF and the adapter that the router has for a model."""
        preset = str(model["status"].get("preset", ""))
        values = dict(re.findall(r"^(model|lora) = (.*)$", preset, re.MULTILINE))
        return tuple(Path(values[name]) for name in ("model", "lora") if name in values) or (Path(),)

    def _load(self, name: str) -> None:
        """Let the router load a model, and wait until it is loaded."""
        end = time.monotonic() + LOAD_SECONDS
        status = self._models().get(name, {"status": {"value": "missing"}})["status"]
        if status["value"] == "unloaded":
            try:
                self._server.post("/models/load", {"model": name})
            except AnsweredError as error:
                if "already running" not in error.said:  # a request may have come before
                    raise
        while time.monotonic() < end:
            status = self._models().get(name, {"status": {"value": "missing"}})["status"]
            if status["value"] in {"loaded", "sleeping"}:
                return
            if status["value"] != "loading":
                break
            time.sleep(_POLL_SECONDS)
        code = f", exit status {status['exit_code']}" if "exit_code" in status else ""
        raise TargetError(
            f"{self._server.url} cannot load {name}: it is {status['value']}{code}. See the server's log; a model that "
            "does not fit into memory beside the active one needs --models-max 1"
        )

    def _wait_until_idle(self) -> None:
        """Wait until no request is in progress, but not for long: the switch ends those that are."""
        end = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < end:
            try:
                slots = self._server.get("/slots", {"model": self._loop, "autoload": "false"})
            except AnsweredError:  # it is not loaded, or was started with --no-slots
                return
            if not any(one.get("is_processing") for one in slots):
                return
            time.sleep(_POLL_SECONDS)

    def _unload(self, name: str) -> None:
        if self._models().get(name, {"status": {}})["status"].get("value") in {"loaded", "loading", "sleeping"}:
            self._server.post("/models/unload", {"model": name})


class LlamaAdapters(_LlamaServer):
    """A llama-server that was started with a base model and LoRA adapters."""

    def observe(self, release: Release) -> Observed:
        """Return the release whose adapter is applied; base and adapter are checked by hash."""
        active = [one for one in self._started(release) if one["scale"] != 0]
        base = self._base()
        if len(active) > 1 or any(one["scale"] != 1 for one in active):
            scales = ", ".join(f"{one['path']} at {one['scale']:g}" for one in active)
            return Observed(None, detail=f"{self._server.url} applies {scales}; expected one adapter at 1")
        files = (base, *(Path(one["path"]) for one in active))
        try:
            digest = _digest(*files)
        except OSError as error:
            return Observed(None, detail=f"{self._server.url} has a file that cannot be read here: {error}")
        label = next((label for path, label in self._files(".lora") if path in files[1:]), BASE if not active else None)
        if label == release.label and digest != release.sha256:
            return Observed(None, digest, f"{files[-1]} has not the content of {label}, but {digest[:16]}")
        return Observed(label, digest, f"{self._server.url} applies {active[0]['path'] if active else 'no adapter'}")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Put the adapter into the folder, and find it among those that the server has loaded."""
        if release.label != BASE and release.adapter_gguf is None:
            raise TargetRefused(
                f"{release.name} is a merged GGUF, and this server switches adapters; set export.form: adapter and "
                "train again, or form: router for this target"
            )
        server_options(release)
        base, adapter = self._put_base(release), self._put_adapter(release)
        adapters = self._started(release)
        active = [Path(one["path"]) for one in adapters if one["scale"] != 0]
        restart = f"Restart it with: {self._adapters_command(release, active)}"
        served = self._base()
        if served != base and (not served.is_file() or hash_file_cached(served) != release.gguf_sha256):
            raise TargetError(
                f"{self._server.url} serves the base model {served}, and {release.name} needs {base}. {restart}"
            )
        if adapter is not None and adapter not in [Path(one["path"]) for one in adapters]:
            raise TargetError(
                f"{self._server.url} has not loaded {adapter}, and llama-server loads adapters only at its start. "
                f"{restart}"
            )
        if self._caches_prompts():
            raise TargetError(
                f"{self._server.url} reuses the cache of prompts after a change of adapters, so that answers would "
                f"come from two adapters mixed. {restart}"
            )
        lora = [{"id": one["id"], "scale": float(Path(one["path"]) == adapter)} for one in adapters]
        return self._endpoint(self._loop, extra_body={"lora": lora} if lora else {})

    def activate(self, release: Release) -> UpstreamSettings:
        """Apply the release's adapter, and no other.

        Requests name no adapter from now on: after a restart, the ids of `stage` may be of others.
        """
        adapter = self._put_adapter(release)
        scales = [{"id": one["id"], "scale": float(Path(one["path"]) == adapter)} for one in self._adapters()]
        if scales:
            self._server.post("/lora-adapters", scales)
        return self._endpoint(self._loop)

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Remove adapters that the server has not loaded: the command that started it must work once more."""
        loaded = {Path(one["path"]) for one in self._adapters()}
        removed = []
        for path, label in [*self._files(".lora")]:
            if label not in keep and path not in loaded:
                path.unlink(missing_ok=True)
                removed.append(label)
        for path, _ in [*self._files(".gguf", "base-[0-9a-f]{12}")]:
            if path != self._base():
                path.unlink(missing_ok=True)
        self._remove_parts()
        return removed

    def start_command(self, release: Release) -> str | None:
        """Return the command that starts the server with this release loaded; it applies what is applied now."""
        if release.label != BASE and release.adapter_gguf is None:
            return None  # `stage` refuses it
        try:
            active = [Path(one["path"]) for one in self._adapters() if one["scale"] != 0]
        except TargetError:
            active = []
        return self._adapters_command(release, active)

    def _adapters_command(self, release: Release, active: Collection[Path]) -> str:
        """Return the command that starts the server with the release and the newest others; some are applied."""
        own = self._put_adapter(release)
        there = [path for path, _ in self._files(".lora")]
        adapters = [path for path in there if path in {*there[-self._settings.keep :], *active, own}]
        scaled = ",".join(f"{path}:{int(path in active)}" for path in adapters)
        options: dict[str, Any] = {"model": self._put_base(release)}
        if scaled:
            options["lora-scaled"] = scaled
        return self._command({**options, "alias": self._loop, **server_options(release), "cache-prompt": False})

    def _put_base(self, release: Release) -> Path:
        return self._put(release.gguf, release.gguf_sha256, f"base-{release.gguf_sha256[:12]}", ".gguf")

    def _put_adapter(self, release: Release) -> Path | None:
        if release.adapter_gguf is None:
            return None
        return self._put(release.adapter_gguf, _adapter_sha256(release), release.label, ".lora")

    def _started(self, release: Release) -> list[dict[str, Any]]:
        """Return the same as `_adapters`; the error says how to start a server that does not answer."""
        try:
            return self._adapters()
        except AnsweredError:
            raise
        except TargetError as error:
            if release.label != BASE and release.adapter_gguf is None:
                raise
            raise TargetError(f"{error}. Its start command: {self._adapters_command(release, [])}") from error

    def _adapters(self) -> list[dict[str, Any]]:
        """Return the adapters that the server has loaded: id, path and scale."""
        listed = self._server.get("/lora-adapters")
        try:
            return [{"id": int(one["id"]), "path": str(one["path"]), "scale": float(one["scale"])} for one in listed]
        except (KeyError, TypeError, ValueError):
            raise TargetError(
                f"{self._server.url} answered /lora-adapters with {short_repr(listed)}; expected llama-server's list "
                "of adapters. Correct the target's url"
            ) from None

    def _base(self) -> Path:
        """Return the GGUF that the server says it has loaded."""
        found = self._server.get("/props")
        if not isinstance(found, dict) or not found.get("model_path"):
            raise TargetError(
                f"{self._server.url} answered /props without model_path: {short_repr(found)}; expected a llama-server"
            )
        return Path(str(found["model_path"]))

    def _caches_prompts(self) -> bool:
        """Return whether the server reuses the computed state of a prompt that it has seen before.

        llama.cpp keeps that state when the scales of the adapters change, though it depends on them.
        """
        body = {"prompt": "one two three four five six seven eight", "n_predict": 1, "temperature": 0, "id_slot": 0}
        for _ in range(2):
            answer = self._server.post("/completion", body)
        timings = answer.get("timings") if isinstance(answer, dict) else None
        if not isinstance(timings, dict) or not isinstance(timings.get("cache_n"), int):
            raise TargetError(
                f"{self._server.url} does not say how much of a prompt it took from its cache (timings.cache_n); "
                "update it"
            )
        return bool(timings["cache_n"] > 0)


def server_options(release: Release, *, for_ini: bool = False) -> dict[str, Any]:
    """Return the options of llama-server for a release, by their long names.

    Without `deploy.config`: the loop's context for each of 4 slots, its max_tokens, and temperature 0, for requests
    that do not say otherwise.

    Args:
        for_ini: whether they go into an INI file, in which some characters have no escape.

    Raises:
        TargetRefused: `deploy.config` has an option that llama-server has not or this target sets, or a value of
            another type.
    """
    given = {}
    for key, value in release.config.items():
        name = key.replace("_", "-")
        name = _OTHER_NAMES.get(name, name)
        expected = OPTIONS.get(name)
        if expected is None:
            meant = nearest(name, OPTIONS)
            raise TargetRefused(
                f"deploy.config: {key} is no option of llama-server that a deployment sets"
                f"{f'; did you mean {meant}?' if meant else '.'} They are: {', '.join(sorted(OPTIONS))}"
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {int: number and value == int(value), float: number, bool: isinstance(value, bool), str: True}[expected]
        if not fits or isinstance(value, dict | list | None):
            wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[expected]
            raise TargetRefused(f"deploy.config: {key} is {value!r}; llama-server expects {wanted}")
        if for_ini and isinstance(value, str) and (re.search(r"[;#\n\r]", value) or value != value.strip()):
            raise TargetRefused(
                f"deploy.config: {key} is {short_repr(value)}; a preset of llama-server's router cannot hold ';', '#', "
                "line ends, or spaces at an end"
            )
        given[name] = value
    parallel = given.get("parallel", 4)
    defaults = {
        "ctx-size": release.context * max(1, parallel),
        "parallel": parallel,
        "n-predict": release.max_tokens,
        "temperature": 0,
    }
    return {**defaults, **given}


def _digest(gguf: Path, adapter: Path | None = None) -> str:
    """Return the identity of a model of these files, as in the registry."""
    return model_sha256(hash_file_cached(gguf), hash_file_cached(adapter) if adapter else None)


def _adapter_sha256(release: Release) -> str:
    """Return the SHA-256 of the adapter; that it is the evaluated one follows from the model's identity.

    Raises:
        TargetRefused: the adapter was changed since it was evaluated.
    """
    assert release.adapter_gguf is not None
    found = hash_file(release.adapter_gguf)
    if model_sha256(release.gguf_sha256, found) != release.sha256:
        raise TargetRefused(
            f"{release.adapter_gguf} is damaged or was replaced: with its SHA-256 {found[:16]}... the model is not "
            f"{release.sha256[:16]}..., the evaluated one; nothing was deployed. Restore it, or train again"
        )
    return found
