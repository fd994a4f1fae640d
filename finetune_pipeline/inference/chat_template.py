"""Render a GGUF's own chat template the way transformers does, so that training and service see the same text."""

import json
from datetime import datetime
from typing import Any

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Message


class ChatTemplate:
    """A compiled chat template, in jinja's sandbox: it comes with a model file and is not trusted.

    Raises:
        RequestRefused: it is no valid template.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except Exception as error:
            raise RequestRefused(
                f"the model's chat template is not valid jinja: {error}. Ask with a plain `prompt`, or correct "
                "chat_template.jinja beside the model's tokenizer and convert it again"
            ) from error

    def render(self, messages: list[Message]) -> str:
        """The text of the messages with the prompt for the answer.

        Raises:
            RequestRefused: the template refuses these messages (roles in another order, for instance).
        """
        try:
            text: str = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
            return text
        except Exception as error:  # a template can raise anything: it is a program that came with the model
            raise RequestRefused(
                f"the model's chat template cannot render these {len(messages)} messages: {error}. Give them the roles "
                "and the order that the template expects, usually system, user, assistant, user"
            ) from error


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMark(Extension):
        """`{% generation %}` marks what is trained on; for the text it means nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMark, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
