"""API keys with scopes, stored as hashes. Without any key, only this machine is served."""

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Literal, get_args

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import api_keys
from finetune_pipeline.records import Record, UtcDatetime
from finetune_pipeline.serving.errors import Forbidden, Unauthorized

Scope = Literal["infer", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "ft-"


class ApiKeyError(RuntimeError):
    """A key cannot be created or found."""


class ApiKey(Record):
    """A stored key, without its secret."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: UtcDatetime
    revoked_at: UtcDatetime | None = None


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str
    scopes: frozenset[Scope]


LOCAL = Caller("local", frozenset(SCOPES))


def create_key(database: Database, name: str, scopes: Collection[Scope]) -> str:
    """Create a key and return its secret, which is not stored.

    The secret has 256 random bits, so an unsalted SHA-256 is sufficient.

    Raises:
        ApiKeyError: the name is empty, too long, or not printable, or a key with this name is in use.
    """
    if not 1 <= len(name.strip()) <= 100 or not name.isprintable():
        raise ApiKeyError(f"{name[:120]!r} cannot be the name of a key; expected 1 to 100 printable characters.")
    if any(key.name == name and key.revoked_at is None for key in list_keys(database)):
        raise ApiKeyError(f"A key named {name!r} is in use; choose another name, or revoke that key first.")
    secret = _PREFIX + secrets.token_urlsafe(32)
    row = {
        "id": str(uuid7()),
        "name": name,
        "secret_sha256": _hash(secret),
        "scopes": ",".join(scope for scope in SCOPES if scope in scopes),
        "created_at": datetime.now(UTC),
    }
    with database.write() as connection:
        connection.execute(api_keys.insert().values(row))
    return secret


def list_keys(database: Database) -> list[ApiKey]:
    """Return all keys, including revoked ones, oldest first."""
    with database.read() as connection:
        rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.id)).all()
    return [
        ApiKey(
            id=row.id,
            name=row.name,
            scopes=tuple(scope for scope in SCOPES if scope in row.scopes.split(",")),
            created_at=row.created_at,
            revoked_at=row.revoked_at,
        )
        for row in rows
    ]


def revoke_key(database: Database, name: str) -> int:
    """Revoke every key with this name or id, and return how many.

    Raises:
        ApiKeyError: there is none.
    """
    k = api_keys.c
    which = sa.and_(sa.or_(k.name == name, k.id == name), k.revoked_at.is_(None))
    with database.write() as connection:
        count = connection.execute(sa.update(api_keys).where(which).values(revoked_at=datetime.now(UTC))).rowcount
    if not count:
        names = ", ".join(key.name for key in list_keys(database) if key.revoked_at is None) or "none"
        raise ApiKeyError(f"No key in use is named {name!r}; there are: {names}.")
    return count


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
        """Whether requests need no key."""
        return self._loopback and not self._keys_exist

    @property
    def has_keys(self) -> bool:
        """Whether a key is in use."""
        return bool(self._callers)

    def refresh(self) -> None:
        """Read the keys from the database."""
        with self._database.read() as connection:
            k = api_keys.c
            rows = connection.execute(sa.select(k.secret_sha256, k.name, k.scopes, k.revoked_at)).all()
        self._keys_exist = bool(rows)
        self._callers = {
            row.secret_sha256: Caller(row.name, frozenset(s for s in SCOPES if s in row.scopes.split(",")))
            for row in rows
            if row.revoked_at is None
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
        caller = self._callers.get(_hash(secret.strip())) if kind.lower() == "bearer" else None
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


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
