"""API keys of the gateway, with scopes; their secrets are stored as hashes."""

import hashlib
import secrets
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Literal, get_args

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from finetune_pipeline.database.connection import Database
from finetune_pipeline.database.tables import api_keys
from finetune_pipeline.records import Record, UtcDatetime

Scope = Literal["infer", "feedback", "view", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "ft-"


class ApiKeyError(RuntimeError):
    """A key cannot be created or found."""


class ApiKey(Record):
    """A stored key, with the hash of its secret."""

    id: str
    name: str
    secret_sha256: str
    scopes: tuple[Scope, ...]
    created_at: UtcDatetime
    revoked_at: UtcDatetime | None = None


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
        "secret_sha256": hash_of_secret(secret),
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
    return [ApiKey(**{**row._mapping, "scopes": row.scopes.split(",")}) for row in rows]


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


def hash_of_secret(secret: str) -> str:
    """Return the hash under which a secret is stored."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
