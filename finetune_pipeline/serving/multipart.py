"""A streaming reader of multipart/form-data (RFC 7578), for uploads that do not fit into memory."""

import re
from collections.abc import AsyncIterator
from email.message import Message
from email.parser import HeaderParser
from typing import NamedTuple

from finetune_pipeline.serving.errors import BadRequest, WrongMediaType

_MAX_HEAD = 8 * 2**10


class Part(NamedTuple):
    """A piece of a form's field. A field comes in at least two pieces, the last of which is empty."""

    name: str
    filename: str | None
    data: bytes


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a Content-Type names.

    Raises:
        WrongMediaType: it is another type, or names no boundary.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary() or ""
    if header.get_content_type() != "multipart/form-data" or not 0 < len(boundary) <= 200 or not boundary.isascii():
        raise WrongMediaType(
            f"The content type is {content_type[:100] or 'missing'}; send the file as multipart/form-data."
        )
    return boundary.encode()


async def form_parts(boundary: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[Part]:
    """Yield the fields of a form piece by piece.

    Args:
        chunks: the body.

    Raises:
        BadRequest: the body is no form, or it breaks off.
    """
    delimiter = b"\r\n--" + boundary
    buffer = bytearray(b"\r\n")  # the first delimiter may be the first line
    field: tuple[str, str | None] | None = None  # None before the first delimiter
    async for chunk in chunks:
        buffer += chunk
        while (at := buffer.find(delimiter)) >= 0:
            end = at + len(delimiter)
            if len(buffer) < end + 2:
                break
            closing = bytes(buffer[end : end + 2]) == b"--"
            head_end = buffer.find(b"\r\n\r\n", end)
            if not closing and head_end < 0:
                if len(buffer) - end > _MAX_HEAD:
                    raise BadRequest("A part of the form has headers of more than 8 KiB, or none.")
                break
            if field is not None:
                if at:
                    yield Part(*field, bytes(buffer[:at]))
                yield Part(*field, b"")
            if closing:
                return
            field = _field_of(bytes(buffer[end:head_end]))
            del buffer[: head_end + 4]
        safe = len(buffer) - len(delimiter)
        if buffer.find(delimiter) < 0 and safe > 0:
            if field is not None:
                yield Part(*field, bytes(buffer[:safe]))
            del buffer[:safe]
    raise BadRequest("The form breaks off: its last boundary is missing.")


def _field_of(head: bytes) -> tuple[str, str | None]:
    header = HeaderParser().parsestr(head.decode("utf-8", "replace").lstrip("\r\n"))
    disposition = header.get("content-disposition", "")
    names = dict(re.findall(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"', disposition))
    names |= dict(re.findall(r";\s*(name|filename)=([^\";\s]+)", disposition))
    if "name" not in names:
        raise BadRequest("A part of the form has no name in its Content-Disposition.")
    return names["name"], names.get("filename")
