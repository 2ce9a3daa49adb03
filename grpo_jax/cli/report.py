"""`grpo-jax report`: writes the HTML page about a run or an ablation."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli.common import OptionalFile
from grpo_jax.text import on_line


def report(
    source: Annotated[
        Positional[Path],
        arg(metavar="RUN_OR_ABLATION", help="The directory of a run or a sweep, or an ablation's file."),
    ],
    /,
    *,
    output: OptionalFile = None,
    pictures: Annotated[Literal["png", "pdf", "svg"] | None, arg(help_behavior_hint="")] = None,
) -> None:
    """Write one self-contained HTML page about a run or an ablation.

    Args:
        output: Where the page goes: a file or a directory. Default: report.html in that of the run or the sweep.
        pictures: Also draw the plots, as files of this kind in the directory.
    """
    from grpo_jax.report import page

    directory = Path("runs") / source.stem if source.suffix == ".py" else source
    print(on_line(str(page.report(directory, output))))
    if pictures is not None:
        for path in page.draw(directory, pictures):
            print(on_line(str(path)))
