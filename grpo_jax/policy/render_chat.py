"""The program that renders chat templates. `grpo_jax.policy.chat_template` starts it and is answered line by line.

A chat template comes with a model, and it is code. Jinja's sandbox keeps it away from Python, but not from a loop that
never ends or from taking all memory. So it runs in this process, which has little memory, opens no file, and is ended
by the kernel when a text takes too long.

It is a file that is run, not a module that is imported: Python, Jinja and this file start in a tenth of a second, where
JAX and transformers take seconds. Each line of its input is a JSON object with a `template` and its `variables`. Each
is answered with a line: the `text`, or why there is none, as `refused` (by the template) or `failed`.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS, SECONDS = 5, 60  # for one text: of computing, and of waiting for a processor as well
MEMORY = 2**29  # bytes, Python's own included
LONGEST = 2**24  # characters of a text


# Python and Jinja load some of their modules and the time zone when they are first needed: for an escape sequence, a
# filter, an error.
_EVERYTHING = r"{{ '\n' | pprint }}{{ lipsum(1) }}{{ strftime_now('%c') }}{{ 1 / 0 }}"


def main() -> None:
    """Answers every line of the input, until the process that writes them closes it or is gone."""
    _limit()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        answer = render(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answer, flush=True)


def _limit() -> None:
    """Sets the limits of this process. None of them can be raised again."""
    render(_EVERYTHING, {})  # while files can be opened
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)  # ends the process, in the middle of C code too
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, signal.SIG_IGN)  # they reach the training as well, which goes on to the end of its step


def render(template: str, variables: dict[str, Any]) -> str:
    """Returns the answer to one line, as JSON."""
    try:
        text = _compiled(template).render(variables)
        if len(text) > LONGEST:
            return json.dumps({"failed": f"its text has more than {LONGEST} characters"})
        return json.dumps({"text": text})
    except MemoryError:
        return json.dumps({"failed": f"it needs more than {MEMORY >> 20} MiB of memory"})
    except _Refusal as error:
        return json.dumps({"refused": str(error)[:500]})
    except Exception as error:
        return json.dumps({"failed": f"{type(error).__name__}: {str(error)[:500]}".removesuffix(": ")})


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """Compiles a template as transformers does: the same extensions, filters, functions and handling of white space."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
    return environment.from_string(template)


class _Refusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise(message: str) -> None:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore, some of which Python calls by itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute `self`
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks what the assistant says, and changes nothing in the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Macro) -> str:
        return caller()


if __name__ == "__main__":
    main()
