"""Access to the gateway: by API keys, or without one from this machine while no key was ever created."""

from dataclasses import dataclass
from ipaddress import ip_address

from finetune_pipeline.database import Database
from finetune_pipeline.database.api_keys import SCOPES, Scope, hash_of_secret, list_keys
from finetune_pipeline.serving.errors import Forbidden, Unauthorized


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str
    scopes: frozenset[Scope]


LOCAL = Caller("local", frozenset(SCOPES))


class Access:
    """Checks the key of each request against the keys in memory, which `refresh` updates.

    Once a key was created, every request needs one, even from this machine (a reverse proxy is local too), and even
    after all keys were revoked.
    """

    def __init__(self, database: Database, *, loopback: bool) -> None:
        self._database = database
        self._loopback = loopback
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


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
