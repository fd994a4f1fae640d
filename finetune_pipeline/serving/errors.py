"""Error responses, in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

GatewayError               500  a bug, or an event that the store refuses
├── BadRequest             400  the request has the wrong format
│   ├── PreviousResponseNotFound  400  there is no such response to continue
│   └── GenerationRefused  400  the model cannot answer it, for example a schema that cannot be enforced
│       └── ContextLengthExceeded  400  the prompt does not fit into the context
├── Unauthorized           401  the API key is missing or unknown
├── Forbidden              403  the key, or the origin of the request, is not allowed to do this
├── NotFound               404  there is no such path, loop or interaction
│   └── UnknownModel       404  there is no such model
├── MethodNotAllowed       405  the path exists for another method
├── Conflict               409  the current state does not allow it
│   └── IdTaken            409  an event with this id and different content exists
├── RequestTimeout         408  the request did not arrive in time
├── TooLarge               413  the body is larger than the limit
├── WrongMediaType         415  the body is not JSON
├── HeadTooLarge           431  the headers are larger than the limit
├── NotRecorded            500  the store refused the event
├── Overloaded             503  the model's queue, the connections, or the memory for bodies are at their limit
└── Unavailable            503  no model can answer, or nothing can be recorded
"""

from typing import Any


class GatewayError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        kind: OpenAI's error type.
        code: identifies the error for programs.
        detail: information for the operator only, such as paths; other clients are referred to the log.
        retry_after: seconds after which the client should try again.
    """

    status = 500
    kind = "api_error"
    code = "internal_error"

    def __init__(
        self, message: str, *, detail: object = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message if detail is None else f"{message}: {detail}")
        self.message = message
        self.detail = detail
        self.param = param
        self.retry_after = retry_after

    def body(self, *, local: bool) -> dict[str, Any]:
        """Return the JSON for the client; it includes the detail if the gateway serves this machine only."""
        if self.detail is None:
            message = self.message
        else:
            message = f"{self.message}: {self.detail}" if local else f"{self.message}. The gateway's log says why."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(GatewayError):
    """The request has the wrong format."""

    status, kind, code = 400, "invalid_request_error", "invalid_request"


class PreviousResponseNotFound(BadRequest):
    """There is no such response to continue; OpenAI's status for this is 400."""

    code = "previous_response_not_found"


class GenerationRefused(BadRequest):
    """The request has the right format, but the model cannot answer it."""

    code = "request_refused"


class ContextLengthExceeded(GenerationRefused):
    """The prompt does not fit into the model's context."""

    code = "context_length_exceeded"


class Unauthorized(GatewayError):
    """The API key is missing or unknown."""

    status, kind, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(GatewayError):
    """The key, or the origin of the request, is not allowed to do this."""

    status, kind, code = 403, "permission_error", "not_allowed"


class NotFound(GatewayError):
    """There is no such path, loop or interaction."""

    status, kind, code = 404, "invalid_request_error", "not_found"


class UnknownModel(NotFound):
    """There is no such model."""

    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    """The path exists for another method."""

    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(GatewayError):
    """The request did not arrive in time."""

    status, kind, code = 408, "invalid_request_error", "request_timeout"


class Conflict(GatewayError):
    """The state of the model or event does not allow the request."""

    status, kind, code = 409, "invalid_request_error", "conflict"


class IdTaken(Conflict):
    """An event with this id and different content exists."""

    code = "id_taken"


class TooLarge(GatewayError):
    """The body is larger than the limit."""

    status, kind, code = 413, "invalid_request_error", "request_too_large"


class WrongMediaType(GatewayError):
    """The body is not JSON."""

    status, kind, code = 415, "invalid_request_error", "unsupported_media_type"


class HeadTooLarge(GatewayError):
    """The first line and headers are larger than the limit."""

    status, kind, code = 431, "invalid_request_error", "headers_too_large"


class NotRecorded(GatewayError):
    """The store refused the event; it is in a dead-letter file."""

    code = "not_recorded"


class Overloaded(GatewayError):
    """The model's queue, the connections, or the memory for bodies are at their limit."""

    status, kind, code = 503, "api_error", "overloaded"


class Unavailable(GatewayError):
    """No model can answer, or nothing can be recorded."""

    status, kind, code = 503, "api_error", "unavailable"
