"""Generate text with a GGUF model that runs in a child process.

    caller --> Engine --JSON lines--> worker --> scheduler --> native (llama.cpp)
                  ^                                  |
                  +------ deltas, completions -------+

`engine.Engine` is the parent's handle; `worker` is the child. A crash in native code becomes an exception, the memory
is freed when the process ends, and the prompts of all callers are decoded in one batch. `remote.RemoteModel` sends the
same requests to another OpenAI-compatible server.
"""
