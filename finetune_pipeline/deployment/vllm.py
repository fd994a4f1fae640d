"""A vLLM server, in one of two forms.

Adapter: each release is a LoRA adapter that the server loads under a name of its own, `loop-v1.2.0`, while it runs. A
name is never loaded again with other weights, since vLLM would answer from the cached prefixes of the old ones. The
server forgets adapters when it restarts; then they are loaded again.

Merged: each release is a folder with merged weights, and the server has to be restarted with the printed command.

vLLM has no alias that could be moved from one model to the next. So a file in the target's folder says which release is
active; it survives restarts of both sides. Applications ask the gateway, or take the name from the file.
"""

import json
import re
import shlex
import shutil
from collections.abc import Collection, Mapping
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_pipeline.artifacts import flush, hash_file_cached, hash_of, write_text
from finetune_pipeline.deployment.connection import AnsweredError, Connection
from finetune_pipeline.deployment.files import PART, link_or_copy, writing
from finetune_pipeline.deployment.target import BASE, Observed, Release, TargetError, TargetRefused
from finetune_pipeline.inference.chat_template import NO_REASONING, used_variables
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.manifests import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_pipeline.records import Message
from finetune_pipeline.settings import PROJECT_ROOT, UpstreamSettings, VllmTarget, home
from finetune_pipeline.validation_messages import nearest, short_repr

OPTIONS: dict[str, type] = {
    **dict.fromkeys(
        ("max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs",
         "max_num_batched_tokens", "max_lora_rank", "max_loras", "max_cpu_loras", "block_size", "max_logprobs",
         "seed"), int,
    ),
    **dict.fromkeys(("gpu_memory_utilization", "cpu_offload_gb"), float),
    **dict.fromkeys(("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager"), bool),
    **dict.fromkeys(
        ("dtype", "kv_cache_dtype", "quantization", "load_format", "tokenizer_mode", "distributed_executor_backend"),
        str,
    ),
}  # fmt: skip
"""Options of `vllm serve` that `deploy.config` may set, with the type of their value. All take effect at its start."""

SAMPLING: dict[str, type] = {
    "temperature": float, "top_p": float, "min_p": float, "top_k": int, "repetition_penalty": float,
    "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip
"""Defaults for requests that `deploy.config` may set; they go into --override-generation-config."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""

_LABEL = rf"v\d+\.\d+\.\d+|{BASE}|[0-9a-f]{{16}}"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_CANNOT_SERVE = re.compile(
    r"does not (yet )?support|only supports|not supported|unsupported|expected target modules|unexpected", re.IGNORECASE
)
"""By this the server says that it will never load an adapter, whatever it is started with."""


class Vllm:
    """A vLLM server as a deployment target; see `deployment.target.Target`."""

    def __init__(self, settings: VllmTarget, loop: str) -> None:
        self.name = settings.key
        self.wants_merged_folder = settings.form == "merged"
        self._settings = settings
        self._loop = loop
        default = home() / "deployments" / loop / settings.key
        self._folder = (PROJECT_ROOT / settings.folder).absolute() if settings.folder else default
        self._server = Connection(settings)
        self._staged: dict[str, str] = {}  # label -> name of the model at the server

    def check_config(self, release: Release) -> None:
        """Raise TargetRefused for a setting that vLLM does not have."""
        self._options(release)

    def observe(self, release: Release) -> Observed:
        """Return the release that was activated last, if the server still has it and its files are unchanged."""
        models = self._models()
        active = self._active()
        if active is None:
            return Observed(None, detail=f"nothing was activated at {self._server.url}: there is no {self._state}")
        label, name = active["label"], active["model"]
        model = models.get(name)
        if model is None:
            found = f"{self._server.url} does not have {name} any more; it has {', '.join(models)}"
            return Observed(None, detail=f"{found}. A vLLM server forgets adapters when it restarts")
        try:
            digest = self._digest(model)
        except OSError as error:
            return Observed(None, detail=f"the files of {name} cannot be read here: {error}")
        if digest != active["digest"]:
            return Observed(None, digest, f"{name} is loaded from {model['root']}, which was not activated or changed")
        if label == release.label and self._content(release) and digest != self._expected_digest(release):
            return Observed(None, digest, f"{model['root']} has not the weights of {label}")
        return Observed(label, digest, f"{name} is loaded from {model['root']}")

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Load the release's adapter under a name of its own; or write the merged folder, which a restart serves."""
        self._options(release)  # refused before anything is written
        models = self._models()
        longest = next(iter(models.values())).get("max_model_len")
        if isinstance(longest, int) and longest < release.context:
            raise TargetError(
                f"{self._server.url} was started with max_model_len {longest:,}, and the loop's context is "
                f"{release.context:,} tokens. {self._restart(release)}"
            )
        name = self._served_name(release, models)
        if name is None:
            if self._settings.form == "merged":
                raise TargetError(
                    f"{self._server.url} serves {next(iter(models.values()))['root']}, and vLLM loads other weights "
                    f"only at its start. {self._restart(release)}"
                )
            name = self._load(release, models)
        self._staged[release.label] = name
        return UpstreamSettings(
            url=f"{self._server.url}/v1",
            model=name,
            api_key_env=self._settings.api_key_env,
            timeout_seconds=self._settings.timeout_seconds,
        )

    def activate(self, release: Release) -> None:
        """Write into the target's folder that this release is active, which is all that changes."""
        models = self._models()
        name = self._served_name(release, models)
        if name is None:
            raise TargetError(
                f"{self._server.url} does not have {release.name} any more; it has {', '.join(models)}. "
                f"{self._restart(release)}"
            )
        active = {"label": release.label, "model": name, "digest": self._digest(models[name])}
        with writing(self._folder):
            write_text(self._state, json.dumps({**active, "url": self._server.url}, indent=2) + "\n")

    def remove_old(self, keep: Collection[str]) -> list[str]:
        """Unload the loop's other adapters, and remove files of releases that the server does not have."""
        models, removed = self._models(), []
        own = re.compile(rf"{re.escape(self._loop)}-({_LABEL})(?:-\d+)?")
        for name, model in [*models.items()]:
            match = own.fullmatch(name)
            if match and match[1] not in keep and model["parent"] is not None:
                self._unload(name)
                del models[name]
                removed.append(match[1])
        served = {model["root"] for model in models.values()}
        for path in [*self._folder.iterdir()] if self._folder.is_dir() else []:
            match = own.fullmatch(path.name)
            if path.name.startswith(f".{self._loop}-") and path.name.endswith(PART):
                shutil.rmtree(path, ignore_errors=True)  # of a killed process; the caller holds the target's lease
            elif match and path.is_dir() and match[1] not in keep and str(path) not in served:
                part = path.with_name(f".{path.name}{PART}")
                path.rename(part)  # so that a kill leaves no incomplete release under its name
                shutil.rmtree(part, ignore_errors=True)
                removed.append(match[1])
        return [*dict.fromkeys(removed)]

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return the token ids of a conversation from /tokenize, which renders and tokenizes as the server's chat."""
        body = {"model": self._staged[release.label], "messages": messages, "add_generation_prompt": True}
        try:
            return [int(token) for token in self._server.post("/tokenize", body)["tokens"]]
        except AnsweredError as error:
            if error.status == 400:
                raise RequestRefused(error.said) from error
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise TargetError(f"{self._server.url} answered /tokenize without token ids; expected a vLLM") from error

    def start_command(self, release: Release) -> str | None:
        """Return the command that starts the server with the base model and this adapter, or with the merged folder."""
        options = self._options(release)
        base = release.base_name if "/" in release.base_name else str(release.base_folder)
        variables = {}
        if self._settings.form == "merged":
            model = base if release.label == BASE else str(self._place(release))
            names = [f"{self._loop}-{release.label}", self._loop]
        else:
            model, names = base, [release.base_name]
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
            if release.adapter_folder is not None:
                folder = self._place(release)
                options["lora-modules"] = f"{folder.name}={folder}"
        if self._settings.api_key_env:
            variables["VLLM_API_KEY"] = f"${self._settings.api_key_env}"
        parts = urlsplit(self._settings.url)
        words = ["vllm", "serve", model, "--served-model-name", *names]
        words += ["--host", parts.hostname or "127.0.0.1"]
        words += ["--port", str(parts.port or (443 if parts.scheme == "https" else 80))]
        for name, value in options.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", str(value)]
        return " ".join([*(f"{name}={value}" for name, value in variables.items()), shlex.join(words)])

    # ---- releases and their files

    @property
    def _state(self) -> Path:
        """The file that says which release is active."""
        return self._folder / f"{self._loop}.{self.name}.json"

    def _active(self) -> dict[str, str] | None:
        try:
            found = json.loads(self._state.read_text(encoding="utf-8"))
            return {key: str(found[key]) for key in ("label", "model", "digest")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _content(self, release: Release) -> dict[str, Path | str]:
        """Return the files of a release by name, each as a path or as text; none if the server has them itself."""
        if self._settings.form == "merged":
            if release.label == BASE or release.merged_folder is None:
                return {}
            return {path.name: path for path in sorted(release.merged_folder.iterdir()) if path.is_file()}
        if release.adapter_folder is None:
            return {}
        config = _adapter_config(release)
        # Training wrote the base model's path on this machine.
        config["base_model_name_or_path"] = release.base_name
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return {ADAPTER_CONFIG: text, ADAPTER_WEIGHTS: release.adapter_folder / ADAPTER_WEIGHTS}

    def _expected_digest(self, release: Release) -> str:
        return hash_of(
            {
                name: hash_file_cached(source) if isinstance(source, Path) else sha256(source.encode()).hexdigest()
                for name, source in self._content(release).items()
            }
        )

    def _digest(self, model: Mapping[str, Any]) -> str:
        """Return the identity of a model at the server: of the files in its folder, or its Hub id.

        Raises:
            OSError: the folder cannot be read here.
        """
        root = Path(model["root"])
        if model["parent"] is not None:
            return _digest_of(root, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        if root.parent == self._folder:
            return _digest_of(root, [path.name for path in root.iterdir() if path.is_file()])
        return str(model["root"])

    def _place(self, release: Release, loaded: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Return the folder with the release's files, `loop-v1.2.0`; write it if there is none.

        A folder with other content is never written to: the server may have it loaded under this name, so the new one
        is `loop-v1.2.0-2`, and so on. The same if the server has loaded the name from somewhere else.

        Raises:
            TargetRefused: the adapter cannot be served by vLLM; nothing was written.
            TargetError: the folder cannot be written.
        """
        content = self._content(release)
        if not content:
            return release.merged_folder or release.base_folder
        expected = self._expected_digest(release)
        for number in count(1):
            name = f"{self._loop}-{release.label}{f'-{number}' if number > 1 else ''}"
            folder = self._folder / name
            if loaded and name in loaded and loaded[name]["root"] != str(folder):
                continue
            if not folder.exists():
                break
            with writing(folder):
                if _digest_of(folder, content) == expected:
                    return folder
        part = folder.with_name(f".{name}{PART}")
        with writing(self._folder):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                for file, source in content.items():
                    if isinstance(source, Path):
                        link_or_copy(source, part / file)
                    else:
                        write_text(part / file, source)
                if _digest_of(part, content) != expected:
                    raise TargetError(f"the files of {release.name} changed while they were copied; it is tried again")
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            flush(self._folder)
        return folder

    def _options(self, release: Release) -> dict[str, Any]:
        """Return the options of `vllm serve` for a release, by their names with underscores.

        Raises:
            TargetRefused: `deploy.config` has a key that vLLM has not or this target sets, or a value of another type.
        """
        options: dict[str, Any] = {"max_model_len": release.context}
        # The model's generation_config.json could set a repetition penalty, with which nothing was judged.
        sampling: dict[str, Any] = {"temperature": 0}
        if self._settings.form == "adapter":
            # Adapters beyond max_cpu_loras are dropped and read again when they are asked for.
            options |= {"enable_lora": True, "max_cpu_loras": self._settings.keep + 2}
            if release.adapter_folder is not None:
                options["max_lora_rank"] = _rank_option(release)
        options["generation_config"] = "vllm"
        for key, value in release.config.items():
            expected = OPTIONS.get(key) or SAMPLING.get(key)
            if expected is None:
                meant = nearest(key, [*OPTIONS, *SAMPLING])
                raise TargetRefused(
                    f"deploy.config: {key} is no setting of vLLM that a deployment sets"
                    f"{f'; did you mean {meant}?' if meant else '.'} They are: "
                    f"{', '.join(sorted([*OPTIONS, *SAMPLING]))}"
                )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = {int: number and value == int(value), float: number, bool: isinstance(value, bool), str: True}
            if not fits[expected] or isinstance(value, dict | list | None):
                wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[expected]
                raise TargetRefused(f"deploy.config: {key} is {short_repr(value)}; vLLM expects {wanted}")
            (options if key in OPTIONS else sampling)[key] = value
        if options["max_model_len"] < release.context:
            raise TargetRefused(
                f"deploy.config: max_model_len is {options['max_model_len']}, and the loop's context is "
                f"{release.context} tokens; raise it, or lower serving.context"
            )
        if "max_lora_rank" in options and options["max_lora_rank"] < (rank := _rank(release)):
            raise TargetRefused(
                f"deploy.config: max_lora_rank is {options['max_lora_rank']}, and the adapter of {release.name} has "
                f"rank {rank}; raise it, or set form: merged"
            )
        options["override_generation_config"] = json.dumps(sampling)
        unset = used_variables(_chat_template(release)) & NO_REASONING.keys()
        if unset:  # examples have no thoughts, so the model answers at once
            options["default_chat_template_kwargs"] = json.dumps({name: NO_REASONING[name] for name in sorted(unset)})
        return options

    # ---- the server

    def _models(self) -> dict[str, dict[str, Any]]:
        """Return the models of the server by name, base models first: root (path or Hub id) and parent."""
        listed = self._server.get("/v1/models")
        try:
            models = {
                str(one["id"]): {
                    "root": str(one.get("root") or one["id"]),
                    "parent": one.get("parent"),
                    "max_model_len": one.get("max_model_len"),
                }
                for one in listed["data"]
            }
        except (KeyError, TypeError, AttributeError):
            models = {}
        bases = {name: one for name, one in models.items() if one["parent"] is None}
        if not bases:
            raise TargetError(
                f"{self._server.url} answered /v1/models with {short_repr(listed)}; expected vLLM's list of models. "
                "Correct the target's url (without /v1)"
            )
        return bases | models

    def _served_name(self, release: Release, models: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the name under which the server has this release; None if it does not have it."""
        bases = [name for name, model in models.items() if model["parent"] is None]
        if self._settings.form == "merged":
            root = str(self._place(release))
            roots = {root, release.base_name} if release.label == BASE else {root}
            return next((name for name in bases if models[name]["root"] in roots), None)
        if release.label == BASE:
            return bases[0]
        if release.adapter_folder is None:
            raise TargetRefused(
                f"{release.name} has no adapter any more, so vLLM cannot load it; train again, or switch to another "
                "version"
            )
        folder = self._place(release, models)
        return folder.name if folder.name in models else None

    def _load(self, release: Release, models: Mapping[str, Mapping[str, Any]]) -> str:
        """Let the server load the release's adapter, and check that it lists it."""
        folder = self._place(release, models)
        try:
            self._server.post_for_text("/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        except AnsweredError as error:
            if folder.name not in self._models():  # otherwise a killed process had sent the same request
                raise self._not_loaded(release, folder, error) from error
        found = self._models().get(folder.name)
        if found is None or found["root"] != str(folder):
            raise TargetError(
                f"{self._server.url} says that it loaded {folder.name}, but lists "
                f"{found['root'] if found else 'no model of this name'}; see the server's log"
            )
        return folder.name

    def _not_loaded(self, release: Release, folder: Path, error: AnsweredError) -> TargetError:
        if error.status in {404, 405} and error.said in {"Not Found", "Method Not Allowed"}:
            return TargetError(
                f"{self._server.url} cannot load adapters while it runs: it has no /v1/load_lora_adapter, so it was "
                f"started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. {self._restart(release)}"
            )
        if re.search(r"lora is not enabled", error.said, re.IGNORECASE):
            return TargetError(
                f"{self._server.url} cannot load adapters: it was started without --enable-lora. "
                f"{self._restart(release)}"
            )
        if "max_lora_rank" in error.said:
            return TargetError(
                f"{self._server.url} cannot load the adapter of {release.name}: {error.said} {self._restart(release)}"
            )
        if error.status == 404:
            return TargetError(
                f"{self._server.url} does not find {folder}: {error.said} It has to read the target's folder at the "
                "same path; mount it there, or set the target's folder to one that both can read"
            )
        if _CANNOT_SERVE.search(error.said):
            return TargetRefused(
                f"{self._server.url} cannot serve the adapter of {release.name}: {error.said} Set form: merged for "
                f"this target"
            )
        return error

    def _unload(self, name: str) -> None:
        body = {"lora_name": name}
        try:
            self._server.post_for_text("/v1/unload_lora_adapter", body)
        except AnsweredError as error:
            if error.status == 404:
                return
            if error.status != 500:
                raise
            # The server has dropped the weights to make room for others, and fails to drop them again. A request
            # loads them.
            self._server.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
            self._server.post_for_text("/v1/unload_lora_adapter", body)

    def _restart(self, release: Release) -> str:
        return f"Restart it with: {self.start_command(release)}"


def _adapter_config(release: Release) -> dict[str, Any]:
    """Return the adapter's config.

    Raises:
        TargetRefused: it uses what vLLM does not apply.
    """
    assert release.adapter_folder is not None
    config: dict[str, Any] = json.loads((release.adapter_folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unsupported = [
        name
        for name in ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias", "layer_replication",
                     "alora_invocation_tokens")
        if config.get(name)
    ]  # fmt: skip
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        unsupported.append("init_lora_weights")
    if unsupported:
        raise TargetRefused(
            f"vLLM does not apply {', '.join(unsupported)} of the adapter of {release.name}, so its answers would be "
            "of another model; set form: merged for this target"
        )
    return config


def _rank(release: Release) -> int:
    config = _adapter_config(release)
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 1)


def _rank_option(release: Release) -> int:
    """Return the smallest value of --max-lora-rank with which the adapter loads, at least vLLM's default."""
    rank = _rank(release)
    found = next((one for one in RANKS if one >= max(rank, 16)), None)
    if found is None:
        raise TargetRefused(
            f"the adapter of {release.name} has rank {rank}, and vLLM serves at most {RANKS[-1]}; set form: merged for "
            "this target"
        )
    return found


def _digest_of(folder: Path, names: Collection[str]) -> str:
    return hash_of({name: hash_file_cached(folder / name) if (folder / name).is_file() else "" for name in names})


def _chat_template(release: Release) -> str:
    """Return the chat template of the base model, or an empty text."""
    file = release.base_folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        config = json.loads((release.base_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    found = config.get("chat_template")
    return found if isinstance(found, str) else ""
