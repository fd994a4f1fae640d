"""The declared loops, read again when a file changes: a page asks for them many times."""

import threading

from finetune_pipeline.settings import LoopSettings, load_loops, loop_folders, loops_dir

_lock = threading.Lock()
_read: tuple[object, dict[str, LoopSettings]] = (None, {})


def known_loops() -> dict[str, LoopSettings]:
    """Return all loops by name, the user's own first.

    Raises:
        SettingsError: a file is invalid, or two loops have one name.
    """
    global _read
    files = sorted(path for folder in loop_folders() for path in folder.glob("*/*"))
    stamp = [(path, path.stat().st_mtime_ns) for path in files if path.exists()]
    with _lock:
        if _read[0] != stamp:
            outside = loops_dir()
            own = load_loops([outside]) if outside else {}
            _read = (stamp, {**own, **load_loops()})
        return dict(_read[1])
