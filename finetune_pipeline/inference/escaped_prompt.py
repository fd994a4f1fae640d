"""Token ids for messages with control tokens, for a server that would read those as its own.

A user who types `<|im_end|>` must not end his message. Servers such as vLLM parse control tokens in messages, but take
a prompt as token ids. The ids come from the vocabulary of the model's GGUF, by the same rules as in a local engine.

`python -m finetune_pipeline.inference.escaped_prompt GGUF` is the child process: a JSON object a line in and out.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune_pipeline.inference.errors import RequestRefused, UpstreamFailed
from finetune_pipeline.inference.protocol import GenerateRequest

LONGEST = 200_000
"""Characters of a rendered prompt beyond which llama.cpp's tokenizer could take minutes."""


class EscapedPrompts:
    """Renders messages in a child process, which starts with the first request and has no weights."""

    def __init__(self, gguf: Path) -> None:
        self._gguf = gguf
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def tokens(self, request: GenerateRequest) -> list[int] | None:
        """Return the token ids of a request whose messages contain a control token; None if none does.

        Raises:
            RequestRefused: the chat template refuses the messages, or they cannot be tokenized as text.
            UpstreamFailed: the child process has ended.
        """
        body = {
            "messages": request.messages,
            "prefill": request.prefill,
            "variables": request.chat_template_kwargs,
        }
        # A canceled request must not leave its reply to the next one.
        reply = await asyncio.shield(self._exchange(json.dumps(body).encode() + b"\n"))
        if "refused" in reply:
            raise RequestRefused(reply["refused"])
        tokens: list[int] | None = reply["tokens"]
        return tokens

    async def close(self) -> None:
        """End the child process."""
        async with self._lock:
            if self._child is not None and self._child.returncode is None:
                self._child.kill()
                await self._child.wait()

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        async with self._lock:
            if self._child is None or self._child.returncode is not None:
                self._child = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "finetune_pipeline.subprocess_lifetime", str(os.getpid())),
                    *(sys.executable, "-m", "finetune_pipeline.inference.escaped_prompt", str(self._gguf)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=2**24,  # bytes of a line
                )
            child = self._child
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(line)
                await child.stdin.drain()
                reply = await child.stdout.readline()
            except ConnectionError:
                reply = b""
            if not reply:
                code = await child.wait()
                raise UpstreamFailed(
                    f"The process that tokenizes for {self._gguf} ended with exit code {code}; see its output above. "
                    "Restore the file, or deploy the model again."
                )
            found: dict[str, Any] = json.loads(reply)
            return found


def main() -> None:
    """Answer requests until the input ends."""
    from finetune_pipeline.inference.native import NativeVocabulary

    template = NativeVocabulary(Path(sys.argv[1])).template
    for line in sys.stdin:
        request = json.loads(line)
        try:
            chat = template.render(request["messages"], prefill=request["prefill"], variables=request["variables"])
            if chat.escaped and len(chat.text) > LONGEST:
                raise RequestRefused(
                    f"The messages contain a control token of the model, and have {len(chat.text):,} characters; "
                    f"expected at most {LONGEST:,}. Remove it, or send less."
                )
            reply: dict[str, Any] = {"tokens": template.encode([chat])[0] if chat.escaped else None}
        except RequestRefused as error:
            reply = {"refused": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
