"""Chat template and name of a base model, which llama.cpp's converter resolves differently from transformers."""

import json
import re
from pathlib import Path
from typing import Any

from finetune_pipeline.export.process import ExportError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
_LEGACY_TEMPLATE = "chat_template.json"  # of a processor; transformers' tokenizers do not read it
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_MODERN_BERT = re.compile("modern-bert", re.IGNORECASE)
_PHI_3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def chat_template(folder: Path) -> str | None:
    """Return the chat template that transformers resolves for a folder; None if it has none.

    Separate files take precedence over tokenizer_config.json, which may have several templates by name.
    """
    templates: Any = {}
    if (folder / TEMPLATE).is_file():
        templates["default"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    for path in (folder / MORE_TEMPLATES).glob("*.jinja"):
        templates[path.stem] = path.read_text(encoding="utf-8")
    templates = templates or _json(folder / CONFIG).get("chat_template")
    if isinstance(templates, list):
        templates = {one["name"]: one["template"] for one in templates}
    return templates.get("default") if isinstance(templates, dict) else templates


def gguf_name(folder: Path) -> str:
    """Return the name for a GGUF of a base model.

    llama.cpp reads this name: with "phi-3" in it, special tokens absorb the white space after them. So the name
    contains it if and only if the tokenizer's tokens do that, whatever the name of the folder.
    """
    listed = _json(folder / "tokenizer.json").get("added_tokens") or []
    configured = _json(folder / CONFIG).get("added_tokens_decoder") or {}
    tokens = {token["content"]: token for token in [*listed, *configured.values()]}
    absorbs = any(token.get("rstrip") for token in tokens.values()) and tokens.keys() >= _PHI_3_TOKENS
    name = _MODERN_BERT.sub("modern bert", _own_name(folder))
    if not absorbs:
        return _PHI_3.sub("phi 3", name)
    return name if _PHI_3.search(name) else f"{name} (phi-3 tokenizer)"


def stage(folder: Path, tokenizer_folder: Path, staged: Path) -> None:
    """Make a folder of links to a model's files, with the chat template that transformers resolves.

    Args:
        folder: the model in Hugging Face's layout.
        tokenizer_folder: the base model, for its tokenizer.
        staged: the new folder, with a neutral name, since the converter reads it too.
    """
    template, config = chat_template(tokenizer_folder), _json(folder / CONFIG)
    staged.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in {CONFIG, TEMPLATE, MORE_TEMPLATES, _LEGACY_TEMPLATE}:
            (staged / path.name).symlink_to(path.resolve())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
        (staged / TEMPLATE).write_text(template, encoding="utf-8")
    if config:
        (staged / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _own_name(folder: Path) -> str:
    """Return the name under which a model was published, or its folder's (a hash in Hugging Face's cache)."""
    published = str(_json(folder / "config.json").get("_name_or_path") or "")
    if published and published.count("/") <= 1:  # otherwise it is a local path
        return published.rpartition("/")[2] or published
    cached = folder.resolve().parents
    if len(cached) > 1 and cached[0].name == "snapshots" and cached[1].name.startswith("models--"):
        return cached[1].name.rpartition("--")[2]
    return folder.resolve().name


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON ({error}); take the file from the original model again") from error
    return document
