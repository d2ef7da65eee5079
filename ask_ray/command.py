"""What all jobs share: parse the settings, run, and turn a known problem into a message and an exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from ask_ray.config import UserError, parse, parser


def main(description: str, job: Callable[..., Any], **arguments: dict[str, Any]) -> None:
    """Run a job with the command line's settings.

    Args:
        description: what ``--help`` begins with.
        job: called with the settings and, by name, the job's own arguments.
        arguments: the job's own arguments: a name and what :meth:`argparse.ArgumentParser.add_argument` takes. A name
            that starts with an underscore is positional.

    Exits with status 2 for wrong settings and 1 for a run that failed; the message names the field, file or row.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    made = parser(description)
    for name, options in arguments.items():
        made.add_argument(name[1:] if name.startswith("_") else f"--{name}", **options)
    settings, found = parse(made)
    try:
        job(settings, **{name.lstrip("_"): getattr(found, name.lstrip("_")) for name in arguments})
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
