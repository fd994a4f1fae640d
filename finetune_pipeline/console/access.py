"""Who may use the console: everybody on this machine while no API key exists, otherwise who has a key."""

import secrets
import threading
import time
from dataclasses import dataclass

from finetune_pipeline.database import Database
from finetune_pipeline.database.api_keys import SCOPES, ApiKey, Scope, hash_of_secret, list_keys
from finetune_pipeline.hosts import os_user

SESSION_SECONDS = 12 * 3600
"""How long a login holds."""

READING: frozenset[Scope] = frozenset({"view", "feedback", "admin"})
"""A key with one of these may log in and read."""

_REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class ConsoleUser:
    """A person who uses the console.

    Attributes:
        name: the key's name, or that of the operating system's user.
        by_key: logged in with an API key.
    """

    name: str
    scopes: frozenset[Scope]
    by_key: bool

    def may(self, scope: Scope) -> bool:
        """Return whether the person may do what needs this scope; admin may do everything."""
        return scope in self.scopes or "admin" in self.scopes


class ConsoleAccess:
    """Logins of the console, in memory: they end with the process, with their key, or after SESSION_SECONDS.

    Args:
        loopback: the address can be reached only from this machine.
    """

    def __init__(self, database: Database, *, loopback: bool) -> None:
        self._database = database
        self._loopback = loopback
        self._lock = threading.Lock()
        self._sessions: dict[str, tuple[str, float]] = {}  # token -> hash of the key's secret, and when it ends
        self._keys: list[ApiKey] = []
        self._read_at = -1.0

    @property
    def open(self) -> bool:
        """Whether no login is needed: only this machine can reach it, and no key was ever created."""
        return self._loopback and not self._known_keys()

    @property
    def has_keys(self) -> bool:
        """Whether a key that may log in is in use."""
        return any(key.revoked_at is None and READING & set(key.scopes) for key in self._known_keys())

    def log_in(self, secret: str) -> str | None:
        """Return the token of a new session; None if no key in use that may read has this secret."""
        hashed = hash_of_secret(secret.strip())
        if self._key_with(hashed) is None:
            return None
        token = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._lock:
            self._sessions = {known: (key, end) for known, (key, end) in self._sessions.items() if end > now}
            self._sessions[token] = hashed, now + SESSION_SECONDS
        return token

    def log_out(self, token: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(token, None)

    def user(self, token: str | None) -> ConsoleUser | None:
        """Return the user of this session, or the operating system's if no login is needed; None without a session."""
        if self.open:
            return ConsoleUser(os_user(), frozenset(SCOPES), by_key=False)
        hashed, end = self._sessions.get(token or "", ("", 0.0))
        key = self._key_with(hashed) if end > time.monotonic() else None
        return None if key is None else ConsoleUser(key.name, frozenset(key.scopes), by_key=True)

    def _key_with(self, hashed: str) -> ApiKey | None:
        keys = (key for key in self._known_keys() if key.revoked_at is None and READING & set(key.scopes))
        return next((key for key in keys if secrets.compare_digest(key.secret_sha256, hashed)), None)

    def _known_keys(self) -> list[ApiKey]:
        if time.monotonic() - self._read_at > _REFRESH_SECONDS:
            self._keys, self._read_at = list_keys(self._database), time.monotonic()
        return self._keys
