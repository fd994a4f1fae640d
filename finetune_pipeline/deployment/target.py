"""What a deployment target is: a server or folder that can be brought to a release, step by step.

`pipeline.deploy` calls the steps in this order: `observe`, and if the release is not active `stage`, then it compares
the staged release with the judged model, then `activate`, `observe` again, and `remove_old`. Each step can be repeated
after a kill at any point. Until `activate`, the target serves what it served before.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from finetune_pipeline.records import Message
from finetune_pipeline.settings import UpstreamSettings

BASE = "base"
"""Label of the release that is the loop's base model, which serves if the loop has no champion."""


class TargetError(RuntimeError):
    """A target cannot be brought to a release; the message says what it answered and what to do. Worth a retry."""


class TargetRefused(TargetError):
    """A target cannot serve this release at all, so a retry would not help; the message says why."""


@dataclass(frozen=True)
class Release:
    """One model with everything that a target needs to serve it.

    Attributes:
        loop: name of the loop.
        label: "v1.2.0" for a version, "base" for the base model, or the id of a model that was never promoted.
        sha256: of the model, as in the registry; combined for a base with an adapter. Names the content.
        gguf: the whole model, or the base's GGUF if there is an adapter_gguf.
        gguf_sha256: SHA-256 of that file.
        base_folder: the base model in Hugging Face's format.
        base_name: its id on the Hugging Face Hub; the folder's name if it has none.
        adapter_gguf: LoRA adapter as GGUF; None if gguf is merged, or the base model.
        adapter_folder: LoRA adapter in PEFT's format; None for the base model.
        merged_folder: merged weights in Hugging Face's format, made on demand; None if no target asked for them.
        system_prompt: of the loop; empty without one.
        context: tokens of prompt and answer together.
        max_tokens: default for an answer.
        config: `deployment_config`: settings of the server by its own names.
        model_card: Markdown.
        promoted_at: when the version was promoted first; None if it is no version.
    """

    loop: str
    label: str
    sha256: str
    gguf: Path
    gguf_sha256: str
    base_folder: Path
    base_name: str
    adapter_gguf: Path | None = None
    adapter_folder: Path | None = None
    merged_folder: Path | None = None
    system_prompt: str = ""
    context: int = 4096
    max_tokens: int = 512
    config: Mapping[str, Any] = field(default_factory=dict)
    model_card: str = ""
    promoted_at: datetime | None = None

    @property
    def name(self) -> str:
        """The full name, `loop@v1.2.0`."""
        return f"{self.loop}@{self.label}"


@dataclass(frozen=True)
class Observed:
    """What a target serves now under the name that applications use.

    Attributes:
        label: the release's label if the target can tell; None if it serves nothing, or something else.
        digest: what the target itself gives as identity of the model, such as Ollama's digest; empty if none.
        detail: for people: what was found.
    """

    label: str | None
    digest: str = ""
    detail: str = ""


class Target(Protocol):
    """A server or folder. Methods raise TargetError; none waits longer than its settings' timeout for one answer."""

    name: str
    """Name in the settings, unique in a loop."""

    wants_merged_folder: bool
    """Whether `stage` needs `Release.merged_folder`."""

    def check_config(self, release: Release) -> None:
        """Raise TargetRefused for a setting in `Release.config` that `stage` would refuse; send nothing."""

    def observe(self, release: Release) -> Observed:
        """Return what the target serves now; `release` is the wanted one, whose identity it can compare with."""

    def stage(self, release: Release) -> UpstreamSettings | None:
        """Make a release available under a name of its own, without changing what applications get.

        Idempotent: what is there already, by digest, is not sent again. It raises TargetRefused for a key of
        `Release.config` that the target can apply neither now nor in its start command.

        Returns:
            Where the staged release answers, with its own model name; None if the target answers no requests.
        """

    def activate(self, release: Release) -> UpstreamSettings | None:
        """Let the name that applications use mean this release. It was staged before.

        Returns:
            Where the gateway asks for the release from now on; None if that is where it was staged.
        """

    def remove_old(self, keep: Collection[str]) -> Sequence[str]:
        """Remove the loop's other releases from the target, and return their labels.

        Args:
            keep: labels of releases that stay, the active one among them.
        """

    def prompt_tokens(self, release: Release, messages: list[Message]) -> list[int] | None:
        """Return the token ids that a staged release gets for a conversation, with the generation prompt.

        None if the target has no way to tell.

        Raises:
            RequestRefused: the server's chat template refuses this conversation (`inference.errors`).
        """

    def start_command(self, release: Release) -> str | None:
        """Return the shell command that starts the server with this release and config; None if none is needed."""
