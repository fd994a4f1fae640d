"""This machine: whether only it can reach an address, and who uses it."""

import getpass
from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def without_port(host: str) -> str:
    """Return the host of `host:port` or `host`; an IPv6 address is in brackets."""
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


def os_user() -> str:
    """Return the name of the operating system's user, for histories and logs."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
