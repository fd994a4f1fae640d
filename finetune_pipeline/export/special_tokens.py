"""The special tokens of a base model as training uses them, and as its GGUF has to declare them.

llama.cpp takes token 11 of a byte-level BPE for BOS and EOS if a GGUF declares none, and its converter takes ids from
config.json that the tokenizer does not have. So the GGUF declares the tokenizer's, or what serves in their place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.inference.chat_template import NO_REASONING, tokenizer_chat_template, used_variables
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.protocol import END_TOKENS
from finetune_pipeline.inference.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

FORM = 2
"""Number of the form in which a GGUF declares special tokens; one of an earlier form is made again."""

_FROM_GGUF = ("bos_token", "eos_token")
"""Variables of chat templates that every server sets, to the tokens that the GGUF declares."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a base model.

    Attributes:
        ids: by name in transformers (bos, eos, unk, pad), those that the tokenizer has.
        ends: every token that ends an answer: the tokenizer's EOS, the one that the chat template writes after an
            answer, and those of generation_config.json.
        written_end: the one that the chat template writes; None if it writes none.
        variables: texts of the special tokens by their names in chat templates, such as unk_token.
    """

    ids: Mapping[str, int]
    ends: tuple[int, ...]
    written_end: int | None
    variables: Mapping[str, Any]

    def declare(self, writer: "GGUFWriter") -> None:
        """Declare the tokens in a GGUF whose metadata is complete, and adapt the chat template in it.

        Raises:
            SystemExit: the model has no token that could end an answer.
        """
        if not self.ends:
            raise SystemExit(
                "no token ends an answer: the tokenizer has no eos_token, and the chat template writes no control "
                "token after an answer; add one of them to the base model"
            )
        eos = self.ids.get("eos", self.ends[0])
        end = eos if self.written_end is None else self.written_end
        declared = {"eos": eos, "eot": end, "bos": self.ids.get("bos", eos)}
        declared |= {name: self.ids[name] for name in ("unk", "pad") if name in self.ids}
        more = [id for id in self.ends if id not in {eos, end}]
        if more:
            declared["eom"] = more[0]  # the last of three keys for ends; our engine reads all of them from its own
        from gguf import Keys

        [metadata] = writer.kv_data  # of one file, before it is split
        for name, id in declared.items():
            key = getattr(Keys.Tokenizer, f"{name.upper()}_ID")
            metadata.pop(key, None)
            writer.add_uint32(key, id)
        if "bos" not in self.ids:
            metadata.pop(Keys.Tokenizer.ADD_BOS, None)
            writer.add_bool(Keys.Tokenizer.ADD_BOS, False)
        writer.add_string(END_TOKENS, ",".join(map(str, self.ends)))
        template = metadata.pop(Keys.Tokenizer.CHAT_TEMPLATE, None)
        if template is not None:
            writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, self.with_variables(template.value))

    def with_variables(self, template: str) -> str:
        """Return a chat template that sets the special tokens it uses as transformers does, and reasoning off.

        Servers set `bos_token` and `eos_token` to what the GGUF declares, and no other ones. Many switch reasoning on.
        """
        used = used_variables(template)
        given = {name: text for name, text in self.variables.items() if name not in _FROM_GGUF}
        lines = [
            f"{{% set {name} = {json.dumps(given[name], ensure_ascii=False)} %}}" for name in sorted(used & {*given})
        ]
        # A name that nothing sets: so the variable is undefined, as in transformers.
        lines += [f"{{% set {name} = no_{name} %}}" for name in _FROM_GGUF if name in used - {*self.variables}]
        lines += [f"{{% set {name} = false %}}" for name in NO_REASONING if name in used]
        return "".join(f"{line}\n" for line in lines) + template


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Return the special tokens of a base model in Hugging Face's layout; loads transformers."""
    tokenizer = load_tokenizer(folder)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    try:
        written: int | None = tokenizer_chat_template(tokenizer).end_token()
    except RequestRefused:  # no template, or one that cannot be trained with, which is checked before training
        written = None
    ends = [ids["eos"], written, *_configured_ends(folder, tokenizer)]
    return SpecialTokens(
        ids={name: id for name, id in ids.items() if id is not None},
        ends=tuple(dict.fromkeys(id for id in ends if id is not None)),
        written_end=written,
        variables=tokenizer.special_tokens_map,
    )


def _configured_ends(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ends of generation_config.json, as far as the tokenizer has them.

    If it is missing or a copy of config.json, only control tokens count: a configuration of transformers has ids of
    another tokenizer where nobody set them.
    """
    listed, own = _listed_ends(folder)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [id for id in listed if isinstance(id, int) and (id in control or (own and 0 <= id < len(tokenizer)))]


def unusable_ends(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """Return the ends that generation_config.json sets itself and that are no ids of the tokenizer."""
    listed, own = _listed_ends(folder)
    usable = _configured_ends(folder, tokenizer)
    return [id for id in listed if id not in usable] if own else []


def _listed_ends(folder: Path) -> tuple[list[Any], bool]:
    """Return each eos_token_id of generation_config.json or else config.json, and whether somebody set it there."""
    path = folder / "generation_config.json"
    config = json.loads((path if path.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    listed = config.get("eos_token_id")
    found = listed if isinstance(listed, list) else [listed]
    return [id for id in found if id is not None], path.is_file() and not config.get("_from_model_config")
