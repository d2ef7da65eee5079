"""What all jobs share: read the command line, run, and turn a known problem into a message and an exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from ask_ray.config import Settings, UserError, parse, parser

Options = dict[str, Any]


def with_settings(description: str, job: Callable[[Settings], object]) -> None:
    """Run a job with the settings of the command line. Exits as :func:`guarded` does."""
    settings, _ = parse(parser(description))
    guarded(lambda: job(settings))


def with_arguments(description: str, job: Callable[..., object], **arguments: Options) -> None:
    """Run a job that looks at a finished run, with arguments of its own. Exits as :func:`guarded` does.

    Args:
        description: what ``--help`` shows first.
        job: called with the arguments by name.
        arguments: names, and what :meth:`argparse.ArgumentParser.add_argument` takes; one marked ``positional`` has no flag.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, options in arguments.items():
        flag = name if options.pop("positional", False) else f"--{name}"
        made.add_argument(flag, **options)
    found = made.parse_args()
    guarded(lambda: job(**vars(found)))


def guarded(job: Callable[[], object]) -> None:
    """Run `job`; exit with 2 for wrong settings, 1 for a run that failed, 130 when interrupted, and a plain message."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells of every checkpoint it finds
    try:
        job()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
