"""Access to the gateway: by API keys, or without one from this machine while no key was ever created."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_pipeline.database import Database
from finetune_pipeline.database.api_keys import SCOPES, Scope, hash_of_secret, list_keys
from finetune_pipeline.hosts import is_loopback, without_port
from finetune_pipeline.serving.errors import Forbidden, Unauthorized


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str
    scopes: frozenset[Scope]

    @property
    def key(self) -> str | None:
        """Return the name of the caller's API key; None without a key, because a key may have LOCAL's name too."""
        return None if self is LOCAL else self.name


LOCAL = Caller("local", frozenset(SCOPES))

ANY_ORIGIN = "*"


class Access:
    """Checks the key of each request against the keys in memory, which `refresh` updates.

    Once a key was created, every request needs one, even from this machine (a reverse proxy is local too), and even
    after all keys were revoked.

    Args:
        loopback: the address can be reached only from this machine.
        allow_origins: origins whose web pages may use the gateway, as `parse_origin` returns them, in addition to
            those of this machine.
    """

    def __init__(self, database: Database, *, loopback: bool, allow_origins: Iterable[str] = ()) -> None:
        self._database = database
        self._loopback = loopback
        self._allow_origins = frozenset(allow_origins)
        self._callers: dict[str, Caller] = {}
        self._keys_exist = False
        self.refresh()

    @property
    def open(self) -> bool:
        """Return whether requests need no key."""
        return self._loopback and not self._keys_exist

    @property
    def has_keys(self) -> bool:
        """Return whether a key is in use."""
        return bool(self._callers)

    def refresh(self) -> None:
        """Read the keys from the database."""
        keys = list_keys(self._database)
        self._keys_exist = bool(keys)
        self._callers = {
            key.secret_sha256: Caller(key.name, frozenset(key.scopes)) for key in keys if key.revoked_at is None
        }

    def allows_origin(self, origin: str) -> bool:
        """Return whether web pages of this origin (`https://app.example`) may use the gateway."""
        if origin in self._allow_origins or ANY_ORIGIN in self._allow_origins:
            return True
        return is_loopback(without_port(origin.partition("://")[2]))

    def check(self, authorization: str | None, scope: Scope | None) -> Caller:
        """Return the caller if the key has the scope.

        Args:
            authorization: the request's header.
            scope: the required scope; None accepts any key.

        Raises:
            Unauthorized: the key is missing or unknown.
            Forbidden: the key does not have the scope.
        """
        if self.open:
            return LOCAL
        kind, _, secret = (authorization or "").partition(" ")
        caller = self._callers.get(hash_of_secret(secret.strip())) if kind.lower() == "bearer" else None
        if caller is None:
            found = "The API key is unknown" if authorization else "This gateway needs an API key"
            raise Unauthorized(f"{found}. Send `Authorization: Bearer KEY` with a key from `finetune key create`.")
        if scope is not None and scope not in caller.scopes:
            scopes = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(
                f"The key {caller.name!r} has the scopes {scopes}, but this needs {scope}. Create another key."
            )
        return caller


def parse_origin(text: str) -> str:
    """Return an origin as browsers send it: in lower case, and without the default port.

    Args:
        text: `https://app.example`, `http://app.example:3000`, `null` (pages from files), or `*`.

    Raises:
        ValueError: it is not an origin.
    """
    origin = text.strip().lower().removesuffix("/")
    if origin not in (ANY_ORIGIN, "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@*,]+", origin):
        raise ValueError(
            f"{text!r} is not the origin of a web page. Give its scheme, host and port, such as "
            "https://app.example or http://app.example:3000."
        )
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if origin.startswith(f"{scheme}://"):
            origin = origin.removesuffix(port)
    return origin
