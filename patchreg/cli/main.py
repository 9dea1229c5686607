"""The command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

LIGHTNING = {
    "fit": "train a model from a configuration",
    "validate": "measure a checkpoint on the validation pairs",
    "test": "measure a checkpoint on the test pairs",
    "predict": "register the test pairs and write their transforms",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``patchreg``.

    Returns:
        0 when the output is written and valid; 2 for wrong usage or bad input, told in one sentence on stderr; 1 where
        one of several processes crashed or was killed.
    """
    # Threads that spin while they wait slow a shared machine, and a training with loader processes, ten times and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(a in ("-v", "--verbose") for a in given)
    training = bool(given) and given[0] in LIGHTNING
    set_up_logging(logging.DEBUG if verbose else logging.INFO if training else logging.WARNING)
    if training:
        return _reporting(lambda: _lightning(given), verbose)
    options = _parse(given)
    command: Callable[[argparse.Namespace], None] = options.command
    return _reporting(lambda: command(options), verbose)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command; ``more`` are those that a command passes on to Lightning."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and not hasattr(options, "more"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return options


def _lightning(arguments: list[str]) -> None:
    from patchreg.cli.lightning import run

    run(arguments)


def _reporting(action: Callable[[], None], verbose: bool) -> int:
    from patchreg.errors import PatchregError, RankLost

    try:
        action()
    except PatchregError as error:
        if verbose:
            logging.getLogger("patchreg").exception("where it happened")
        print(f"patchreg: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RankLost) else 2
    except BrokenPipeError:  # the reader went away, as in `patchreg models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("patchreg: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def set_up_logging(level: int) -> None:
    """Let patchreg's messages from ``level`` on appear on stderr."""
    from rich.logging import RichHandler

    from patchreg.cli.progress import STDERR

    handler = RichHandler(console=STDERR, show_time=False, show_path=False, markup=False, highlighter=None)
    logger = logging.getLogger("patchreg")
    logger.handlers = [handler]
    logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    from patchreg import __version__
    from patchreg.cli import commands
    from patchreg.cli.memory import add_memory

    parser = argparse.ArgumentParser(
        prog="patchreg",
        description="3-D image registration with networks, for volumes of any size, spacing and orientation. For research, not for clinical use.",
        epilog="'patchreg COMMAND --help' tells more. Start with: patchreg demo -o demo",
    )
    parser.add_argument("--version", action="version", version=f"patchreg {__version__}")
    found = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in LIGHTNING.items():
        found.add_parser(name, help=text, add_help=False)
    for add in (
        commands.add_register, commands.add_apply, commands.add_evaluate, commands.add_models, commands.add_kernels,
        add_memory, commands.add_demo,
    ):  # fmt: skip
        add(found)
    return parser


if __name__ == "__main__":
    sys.exit(main())
