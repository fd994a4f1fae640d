"""Check a base model's tokenizer and chat template before training: does its GGUF read what training reads?

Only a vocabulary is converted, without weights, so this takes seconds. It runs in a child process, which loads
transformers and llama.cpp.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from finetune_pipeline.artifacts import hash_file_cached, hash_of, package_versions, write_text
from finetune_pipeline.export.base import CONFIG_FILES
from finetune_pipeline.export.gguf import CONVERTER, convert_here, converter_environment, converter_folder
from finetune_pipeline.export.parity import compare_tokens, parity_conversations
from finetune_pipeline.export.process import ExportError, run_step
from finetune_pipeline.export.special_tokens import FORM, unusable_ends
from finetune_pipeline.export.tokenizer import gguf_name, stage
from finetune_pipeline.inference.chat_template import ChatTemplate, tokenizer_chat_template
from finetune_pipeline.inference.errors import EngineError, RequestRefused
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.manifests import TOKENIZER_FILES
from finetune_pipeline.records import Message, Turn, chat_messages
from finetune_pipeline.schemas import Schema
from finetune_pipeline.settings import home
from finetune_pipeline.validation_messages import short_repr
from finetune_pipeline.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHECKS = 6  # number of what is checked; a result of an earlier one is not used
_ANSWER = "answer"
_LONG = " ".join(map(str, range(1000)))  # a template may cut long messages
_SHOWN = 3


def check_vocabulary(
    base: Path,
    system_prompt: str,
    prompts: Sequence[str] = (),
    histories: Sequence[Sequence[Turn]] = (),
    schema: Schema | None = None,
) -> list[str]:
    """Return what is wrong with a base model's tokenizer and chat template; empty if nothing is.

    The template has to write all messages, to end answers, and to write the same prompt in service as in training;
    llama.cpp's converter has to know the tokenizer; and llama.cpp has to read the same tokens as transformers. The
    result is cached by the content of the files.

    Args:
        base: the folder; its weights are not needed.
        system_prompt: of the loop; empty without one.
        prompts: prompts of the loop, whose tokens are compared as well.
        histories: earlier messages in the loop's data; the template has to accept one of them.
        schema: the JSON Schema to which answers are constrained; its texts have to be tokens of the vocabulary.

    Raises:
        ExportError: the converter is missing, or the check failed itself.
    """
    files = [base / name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (base / name).is_file()]
    script = converter_folder() / CONVERTER
    request = {
        "system_prompt": system_prompt,
        "prompts": [*prompts],
        "histories": [[turn.model_dump() for turn in history] for history in histories],
        "schema": schema,
    }
    packages = package_versions("llama_cpp_python", "transformers", "tokenizers")
    key = hash_of(
        [_CHECKS, FORM, request, {path.name: hash_file_cached(path) for path in files}, packages, str(script)]
    )
    cached = home() / "cache" / "base_checks" / f"{key[:16]}.json"
    with suppress(OSError, ValueError):
        found: list[str] = json.loads(cached.read_text(encoding="utf-8"))
        return found
    try:
        with TemporaryDirectory() as folder:
            staged = Path(folder) / "model"
            stage(base, base, staged)
            write_text(Path(folder) / "request.json", json.dumps(request))
            what = f"checking the tokenizer of {base}"
            run_step("check", [str(base), str(script), folder], what, converter_environment())
            text = (Path(folder) / "problems.json").read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"the tokenizer of {base} cannot be checked, because a temporary file cannot be written ({error}); free "
            "some space, or set TMPDIR to another folder"
        ) from error
    with suppress(OSError):  # a read-only home: it is checked again next time
        write_text(cached, text)
    problems: list[str] = json.loads(text)
    return problems


def check_here(base: Path, script: Path, folder: Path) -> None:
    """Check in this process; `folder` holds the staged model and the request, and gets the problems."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    problems = list(_problems(base, script, folder, **request))
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")


def _problems(
    base: Path,
    script: Path,
    folder: Path,
    system_prompt: str,
    prompts: list[str],
    histories: list[list[Message]],
    schema: Schema | None,
) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(base)
    except Exception as error:  # transformers raises anything, also for a damaged file
        reason = f"{type(error).__name__}: {first_line(str(error))}"
        yield f"the tokenizer of {base} cannot be loaded ({reason}); copy the original model's tokenizer files again"
        return
    try:
        template = tokenizer_chat_template(tokenizer)
    except RequestRefused as error:
        yield str(error)
        return
    turns = [[Turn.model_validate(turn) for turn in history] for history in histories]
    problem = template_problem(base, template, system_prompt, turns) or missing_embeddings(base, tokenizer)
    if problem:
        yield problem
        return
    unusable = ", ".join(short_repr(end) for end in unusable_ends(base, tokenizer))
    if unusable:
        yield (
            f"{base / 'generation_config.json'}: eos_token_id has {unusable}, but the tokenizer's ids are 0 to "
            f"{len(tokenizer) - 1:,}; correct it, or copy the file from the original model"
        )
    gguf = folder / "vocabulary.gguf"
    unconverted = _convert_vocabulary(base, script, folder / "model", gguf)
    if unconverted:
        yield unconverted
        return
    from finetune_pipeline.inference.native import NativeVocabulary

    chats = [chat_messages(system_prompt, prompt) for prompt in prompts]
    chats += [chat_messages(system_prompt, "question", history) for history in turns]
    conversations = parity_conversations(tokenizer, system_prompt, chats)
    try:
        vocabulary = NativeVocabulary(gguf)
        parity = compare_tokens(tokenizer, vocabulary.template.tokens, conversations)
    except EngineError as error:
        yield f"llama.cpp cannot use the vocabulary of {base}: {error}"
        return
    if parity.differences:
        pairs = dict.fromkeys(difference.first_pair(tokenizer) for difference in parity.differences)
        yield (
            f"llama.cpp would read other tokens than training does, in {len(parity.differences)} of "
            f"{sum(parity.compared.values())} test conversations with {base}: {'; '.join([*pairs][:_SHOWN])}. Use the "
            "unchanged tokenizer files of a model that llama.cpp supports"
        )
    if schema is not None:
        from finetune_pipeline.inference.grammar import check_schema

        try:
            check_schema(vocabulary, schema)
        except RequestRefused as refused:
            yield (
                f"the output_schema cannot be enforced while decoding with {base}: {str(refused).rstrip('.')}. Change "
                "the schema or the base model, or set serving.constrain: none"
            )


def template_problem(
    base: Path, template: ChatTemplate, system_prompt: str, histories: Sequence[Sequence[Turn]] = ()
) -> str:
    """Return what a base model's chat template makes of a loop's conversations that cannot be trained or served.

    Only the first problem, because the others often have the same cause; an empty text if there is none.
    """
    other = "use a base model with another one, or put a changed chat_template.jinja into its folder"
    without = f"leave system_prompt out, or {other}"
    question, answer = f"question {_LONG}", f"{_ANSWER} {_LONG}"
    chat = chat_messages(system_prompt, question)
    reason = _rejection(template, chat)
    if reason and system_prompt and not _rejection(template, chat[1:]):
        return f"system_prompt: the chat template of {base} rejects system messages ({reason}); {without}"
    if reason:
        return f"the chat template of {base} rejects a question with an answer ({reason}); {other}"
    prompt, finished = _render(template, chat, answer)
    if not _writes(prompt, question):
        return f"the chat template of {base} leaves out or changes the last user message; {other}"
    if not _writes(finished, answer):
        return f"the chat template of {base} leaves out or changes the answer; {other}"
    if not _writes(prompt, system_prompt):
        return f"system_prompt: the chat template of {base} leaves out or changes the system message; {without}"
    try:
        template.end_token()
    except RequestRefused as error:
        return f"{base}: {error}"
    chat = chat_messages(system_prompt, "question")
    same_start = f"{other} in which the generation prompt is the text that precedes a finished answer"
    mismatch = _mismatch(template, chat)
    if mismatch and system_prompt and not _rejection(template, chat[1:]) and not _mismatch(template, chat[1:]):
        return (
            f"system_prompt: with it, the chat template of {base} {mismatch}; leave system_prompt out, or {same_start}"
        )
    if mismatch:
        return f"the chat template of {base} {mismatch}; {same_start}"
    earlier = [chat_messages(system_prompt, "question", history) for history in histories]
    rejected = [_rejection(template, messages) for messages in earlier]
    if rejected and all(rejected):
        roles = ", ".join(turn.role for turn in histories[0])
        return (
            f"the chat template of {base} rejects the conversations of this loop's data ({rejected[0]}), which have "
            f"earlier messages ({roles}): nothing would be left to train on; {other}"
        )
    accepted = (messages for messages, reason in zip(earlier, rejected, strict=True) if not reason)
    mismatch = next(filter(None, (_mismatch(template, messages) for messages in accepted)), "")
    return mismatch and f"after earlier messages, the chat template of {base} {mismatch}; {same_start}"


def _render(template: ChatTemplate, messages: list[Message], answer: str = _ANSWER) -> tuple[str, str]:
    """Return the prompt that is served, and the conversation with its answer that training reads."""
    finished = [*messages, {"role": "assistant", "content": answer}]
    return template.render(messages).text, template.render(finished, add_generation_prompt=False).text


def _rejection(template: ChatTemplate, messages: list[Message]) -> str:
    """Return why a template does not render a conversation and its answer; empty if it does."""
    try:
        _render(template, messages)
    except RequestRefused as error:
        return first_line(str(error.__cause__ or error))
    return ""


def _writes(rendered: str, message: str) -> bool:
    """Return whether a rendered text contains a message; its white space may differ."""
    return " ".join(message.split()) in " ".join(rendered.split())


def _mismatch(template: ChatTemplate, messages: list[Message]) -> str:
    """Return how training reads another text before an answer than service does; empty if it does not.

    Training computes the loss after what prompt and finished conversation share, so the model learns to write the rest.
    """
    prompt, finished = _render(template, messages)
    if not finished.startswith(prompt):
        shared = len(os.path.commonprefix([prompt, finished]))  # noqa: RUF071  # of texts, by character
        start = prompt.rfind("\n", 0, shared) + 1
        return (
            "writes another prompt in service than training reads, so the model would answer after a text that it was "
            f"not trained on: the generation prompt ends in {short_repr(prompt[start:])}, but a finished answer in "
            f"{short_repr(finished[start:])}"
        )
    before = template.without_control_tokens(finished[len(prompt) :].rpartition(_ANSWER)[0])
    if before.strip():
        return (
            f"writes {short_repr(before)} before a finished answer, but not at the end of a prompt "
            "(add_generation_prompt), so the model would learn to begin each answer with it"
        )
    return ""


def missing_embeddings(base: Path, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return that the model has fewer embeddings than its tokenizer has tokens; empty if it has enough.

    Added tokens do not count if no text becomes them: Gemma 3's tokenizer has one for images, which its 1B model lacks.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    source = tokenizer.get_chat_template()
    added = tokenizer.added_tokens_decoder.items()
    unused = {id for id, token in added if id not in named and token.content not in source}
    last = max(id for id in tokenizer.get_vocab().values() if id not in unused)
    if size is None or last < size:
        return ""
    return (
        f"{base / 'config.json'}: vocab_size is {size:,}, but the tokenizer beside it has ids up to {last:,} "
        f"({tokenizer.convert_ids_to_tokens(last)!r}), so at least {last + 1:,} are needed; copy config.json, weights "
        "and tokenizer files from the same model"
    )


def _convert_vocabulary(base: Path, script: Path, staged: Path, out: Path) -> str:
    """Convert the vocabulary in this process; return why that is not possible, or an empty text."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    arguments = [str(staged), "--vocab-only", "--model-name", gguf_name(base), "--outfile", str(out)]
    try:
        convert_here(base, script, arguments)
    except SystemExit as ended:
        if ended.code in {None, 0}:
            return ""
        reason = ended.code if isinstance(ended.code, str) else (logged or [f"exit status {ended.code}"])[-1]
    except Exception as error:
        if "pre-tokenizer was not recognized" in str(error):
            return (
                f"llama.cpp's converter does not know the pre-tokenizer of {base}: it recognizes a tokenizer by the "
                "tokens of a test text, and no model family that it supports has these. Use the unchanged tokenizer of "
                "a supported model, or set FINETUNE_LLAMA_CPP to a converter that knows this one"
            )
        reason = f"{type(error).__name__}: {first_line(str(error))}"
    else:
        return ""
    return f"llama.cpp's converter cannot convert the vocabulary of {base} ({reason}); use a model that it supports"
