"""A connection to a server that answers requests in JSON."""

import os
from collections.abc import Mapping
from typing import Any

from finetune_pipeline.deployment.target import TargetError
from finetune_pipeline.settings import ServerTarget
from finetune_pipeline.validation_messages import short_repr

_QUOTED_CHARACTERS = 300


class AnsweredError(TargetError):
    """The server answered that something is wrong.

    Attributes:
        status: of the response; 200 if the error was inside a response that claims success.
        said: the server's message.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class Connection:
    """Sends requests to the server of a target; every failure is a TargetError that says what to do."""

    def __init__(self, settings: ServerTarget) -> None:
        self.url = settings.url.rstrip("/")
        self._settings = settings

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON value of a GET request."""
        return self._json("GET", path, None, query)

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON value of a POST request."""
        return self._json("POST", path, body, None)

    def post_for_text(self, path: str, body: Any) -> None:
        """Send a POST request whose success is answered by any text."""
        self._json("POST", path, body, None, plain=True)

    def _json(self, method: str, path: str, body: Any, query: Mapping[str, str] | None, *, plain: bool = False) -> Any:
        """Send a request and return the value.

        Args:
            plain: whether a success may be answered by something else than JSON.

        Raises:
            AnsweredError: the server refused it, or reported an error in a response with status 200.
            TargetError: it did not answer, or with something else than JSON.
        """
        import httpx

        seconds = self._settings.timeout_seconds
        timeout = httpx.Timeout(seconds, connect=min(5.0, seconds))
        what = f"{method} {path}"
        try:
            response = httpx.request(
                method, f"{self.url}{path}", json=body, params=query, headers=self._headers(), timeout=timeout
            )
        except httpx.TimeoutException as error:
            raise TargetError(
                f"{self.url} did not answer {what} within {seconds:g} s; start it, or raise the target's "
                "timeout_seconds"
            ) from error
        except httpx.HTTPError as error:
            raise TargetError(
                f"{self.url} cannot be reached, or broke off during {what} ({type(error).__name__}: {error}); start "
                "it, or correct the target's url"
            ) from error
        try:
            value = response.json()
        except ValueError:
            if plain and response.is_success:
                return response.text
            raise TargetError(
                f"{self.url} answered {what} with status {response.status_code} and something else than JSON: "
                f"{short_repr(response.text)}; correct the target's url (without /v1), or see the server's log"
            ) from None
        problem = value.get("error") if isinstance(value, dict) else None
        if response.is_error or problem:
            if problem is None and isinstance(value, dict):
                problem = value.get("detail")  # of FastAPI: there is no such route
            said = problem.get("message") if isinstance(problem, dict) else problem
            text = str(said or short_repr(response.text))
            raise AnsweredError(
                f"{self.url} answered {what} with status {response.status_code} and the error "
                f"{short_repr(text, _QUOTED_CHARACTERS)}; see the server's log",
                response.status_code,
                text,
            )
        return value

    def _headers(self) -> dict[str, str]:
        name = self._settings.api_key_env
        if name is None:
            return {}
        key = os.environ.get(name)
        if not key:
            raise TargetError(
                f"the environment variable {name} is not set; set it to the API key of {self._settings.url}"
            )
        return {"Authorization": f"Bearer {key}"}
