"""Chat templates: messages to the text of a prompt, rendered in a process of their own, which has limits.

The text is what transformers renders. See `grpo_jax.policy.render_chat` for the process.
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError, one_line, shown

Messages = Sequence[Mapping[str, str]]
"""Chat messages with the keys "role" and "content"."""

_PROGRAM = Path(__file__).with_name("render_chat.py")
# Put at the end of a message that is to be continued. With its space it shows whether the template strips the message.
_END = "GRPOJAXEND "


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model.

    Attributes:
      source: the template, in Jinja's language.
      tokens: further variables of the template: the special tokens, such as `bos_token`.
      where: where the model is, for messages.
    """

    source: str = field(repr=False)
    tokens: Mapping[str, Any]
    where: str

    def render(self, messages: Messages, *, open_turn: bool = True, continues: bool = False) -> str:
        """Renders a chat.

        Args:
          open_turn: begin an assistant turn at the end.
          continues: keep the last turn open instead. The text ends with the last message.

        Raises:
          UserError: if the template does not accept the messages, fails, or needs too much time or memory.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if not continues:
            return self._text(messages, open_turn)
        *others, last = messages
        text = self._text([*others, {**last, "content": last["content"] + _END}], open_turn=False)
        before, end, after = text.rpartition(_END.strip())
        if not end or last["content"].strip() not in before:
            raise UserError(f"the chat template of {self.where} leaves out text of the assistant's last message.")
        return before if after.startswith(" ") else before.rstrip()  # a template that strips a message strips its end

    def _text(self, messages: Messages, open_turn: bool) -> str:
        variables = {**self.tokens, "messages": messages, "tools": None, "documents": None}
        request = {"template": self.source, "variables": {**variables, "add_generation_prompt": open_turn}}
        try:
            line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
        except (TypeError, ValueError, RecursionError):
            raise UserError(f"the messages {shown(messages)} are no JSON, which a chat template reads.") from None
        answer = _PROCESS.ask(line)
        if "refused" in answer:
            roles = ", ".join(str(message.get("role")) for message in messages)
            reason = one_line(answer["refused"]).rstrip(".")
            raise UserError(
                f"the chat template of {self.where} does not accept messages of the roles {roles}: {reason}."
            )
        if "text" not in answer:
            raise UserError(f"the chat template of {self.where} fails: {one_line(answer['failed']).rstrip('.')}.")
        return answer["text"]


class _Process:
    """The process that renders. It is started at the first question, and again after one that has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._end)

    def ask(self, line: str) -> dict[str, str]:
        """Returns the answer to a line: an object with `text`, `refused` or `failed`."""
        with self._lock:
            process = self._process = self._process or _start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # Ctrl-C: the answer is yet to come, and would be taken for that to the next question
                self._end()
                raise
            if answer.endswith("\n"):
                return json.loads(answer)
            return {"failed": _cause(self._end())}

    def _end(self) -> int:
        """Ends the process, and returns its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()
        return process.returncode


def _start() -> subprocess.Popen[str]:
    # -P: the folder of the file, with its many modules, is not where the program imports from.
    command = [sys.executable, "-P", str(_PROGRAM)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="ascii")


def _cause(status: int) -> str:
    """Why the process ended, from its status."""
    if -status in (signal.SIGPROF, signal.SIGALRM):
        return "it takes too long"
    return f"its process ended with {f'the signal {-status}' if status < 0 else f'the status {status}'}"


_PROCESS = _Process()
