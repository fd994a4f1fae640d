"""What the gateway refuses, and how it says so: OpenAI's form, `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any


class GatewayError(Exception):
    """An answer other than 2xx.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        detail: what only who runs the gateway should read, such as paths; others find it in the log.
        retry_after: seconds after which to try again, if that may help.
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
        """The JSON that the client reads; one on this machine, where no keys are, reads the detail too."""
        if self.detail is None:
            message = self.message
        else:
            message = f"{self.message}: {self.detail}" if local else f"{self.message}; the gateway's log says why"
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(GatewayError):
    """The request is not of the form that the API has."""

    status, kind, code = 400, "invalid_request_error", "invalid_request"


class Refused(BadRequest):
    """The request has the right form, and cannot be answered: too long, or a schema that cannot be used."""

    code = "request_refused"


class Unauthorized(GatewayError):
    """No key, or none that is known."""

    status, kind, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(GatewayError):
    """The key, or the place that the request comes from, may not do this."""

    status, kind, code = 403, "permission_error", "not_allowed"


class NotFound(GatewayError):
    """There is no such model, loop or interaction."""

    status, kind, code = 404, "invalid_request_error", "not_found"


class UnknownModel(NotFound):
    """The field `model` names nothing."""

    code = "model_not_found"


class Conflict(GatewayError):
    """What is asked for cannot be done as things are."""

    status, kind, code = 409, "invalid_request_error", "conflict"


class IdTaken(Conflict):
    """An event's id is known with other content."""

    code = "id_taken"


class TooLarge(GatewayError):
    """The request's body is larger than the limit."""

    status, kind, code = 413, "invalid_request_error", "request_too_large"


class WrongMediaType(GatewayError):
    """The request's body is not JSON."""

    status, kind, code = 415, "invalid_request_error", "unsupported_media_type"


class NotRecorded(GatewayError):
    """The store refused an event; it was put aside, and a person has to look."""

    code = "not_recorded"


class Busy(GatewayError):
    """The model's queue is full."""

    status, kind, code = 503, "api_error", "overloaded"


class Unavailable(GatewayError):
    """No model can answer, or an exchange cannot be recorded."""

    status, kind, code = 503, "api_error", "unavailable"
