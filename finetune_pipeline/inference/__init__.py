"""Run a GGUF in a child process of its own: `Engine` is the parent's handle, `worker` the child.

    caller --> Engine --JSON lines--> worker --> scheduler --> native (llama.cpp)
                  ^                                  |
                  +------ pieces, completions -------+

A native crash is an error with a name, memory is given back when the process ends, and prompts of all callers are
decoded together.
"""
