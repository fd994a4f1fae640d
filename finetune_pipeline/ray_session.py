"""The connection to a Ray cluster, for curation and training.

The environment variable RAY_ADDRESS names the cluster; without it, a local one is started and stopped again.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS = "RAY_ADDRESS"
_PACKAGE = Path(__file__).parent


class ClusterError(Exception):
    """Ray is not installed, or the cluster does not respond; the message says what to do."""


def check_installed(setting: str) -> None:
    """Raise a ClusterError that names the setting, unless Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(
            f"{setting} is ray, and Ray is not installed; run "
            ".venv/bin/pip install -c constraints.txt -e '.[ray]', or set compute: local"
        )


@contextmanager
def connected(variables: Mapping[str, str], cores: int | None, object_store_bytes: int) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start a local one; this package is shipped to the workers.

    Args:
        variables: environment variables of the workers.
        cores: CPU cores of a local cluster; None: all of this machine.
        object_store_bytes: object store size of a local cluster.

    Raises:
        ClusterError: no cluster responds at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    common: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(_PACKAGE)], "env_vars": dict(variables)},
        "logging_level": "error",
        "logging_config": ray.LoggingConfig(log_level="ERROR"),
    }
    address = os.environ.get(ADDRESS)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        if address:
            ray.init(address, **common)
        else:
            # Without a token in the environment, Ray writes a token file into the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                "local",
                _node_ip_address="127.0.0.1",
                num_cpus=cores,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                **common,
            )
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster responds at {ADDRESS}={address} ({error}); correct it, or unset it to start a local one"
        ) from error
    # The logging_config, which is for the workers, also makes this process drop all warnings, Ray's and ours.
    root.setLevel(level)
    root.handlers[:] = handlers
    try:
        yield
    finally:
        ray.shutdown()
