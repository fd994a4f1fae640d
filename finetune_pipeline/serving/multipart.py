"""Forms with files (multipart/form-data, RFC 7578) read while they arrive, for uploads that do not fit into memory."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from finetune_pipeline.serving.errors import BadRequest, WrongMediaType


class Part(NamedTuple):
    """A piece of a form's field. The last piece of each field is empty."""

    name: str
    filename: str | None
    data: bytes


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a Content-Type names.

    Raises:
        WrongMediaType: it is another type, or names no boundary.
    """
    media_type, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not 0 < len(boundary) <= 200 or not boundary.isascii():
        raise WrongMediaType(
            f"The content type is {content_type[:100] or 'missing'}; send the file as multipart/form-data."
        )
    return boundary


async def form_parts(boundary: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[Part]:
    """Yield the fields of a form piece by piece.

    Args:
        chunks: the body.

    Raises:
        BadRequest: the body is no form, or it breaks off.
    """
    form = _UploadForm(boundary)
    async for chunk in chunks:
        try:
            form.parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(f"The body is no multipart form: {error}") from error
        for part in form.parts:
            yield part
        form.parts.clear()
    if not form.complete:
        raise BadRequest("The form breaks off: its last boundary is missing.")


class _UploadForm:
    """The callbacks of a parser, which collect what one chunk of the body brought."""

    def __init__(self, boundary: bytes) -> None:
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": lambda data, start, end: self._add(data[start:end]),
                "on_part_end": lambda: self._add(b""),
                "on_end": self._end,
            },
        )
        self.parts: list[Part] = []
        self.complete = False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._field: tuple[str, str | None] = ("", None)

    def _begin(self) -> None:
        self._disposition = b""

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise BadRequest("A part of the form has no name in its Content-Disposition.")
        filename = options.get(b"filename")
        self._field = (
            options[b"name"].decode("utf-8", "replace"),
            None if filename is None else filename.decode("utf-8", "replace"),
        )

    def _add(self, data: bytes) -> None:
        self.parts.append(Part(*self._field, data))

    def _end(self) -> None:
        self.complete = True
