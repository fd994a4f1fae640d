"""Which processes a test has left running."""

import psutil


def descendants(name: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the running descendants of a process (default: this one) whose command line contains a name.

    A process that has ended, but that its parent has not waited for yet, is not running.
    """
    found = []
    for child in (of or psutil.Process()).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has ended meanwhile, or is a zombie
            continue
    return found
