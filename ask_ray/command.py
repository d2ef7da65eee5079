"""What all jobs share: read the command line, run, and turn a known problem into a message and an exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import yaml
from pydantic import ValidationError

from ask_ray.config import Settings, SettingsError, SweepSettings, UserError, describe, parse, parsed, parser, plain

Options = dict[str, Any]


def with_settings(
    description: str, job: Callable[[Settings], object], expand: Callable[[Sequence[str]], Sequence[str]] = list
) -> None:
    """Run a job with the settings of the command line, whose words `expand` may put in full. Exits as :func:`guarded` does."""
    settings, _ = parse(parser(description), expand(sys.argv[1:]))
    guarded(lambda: job(settings))


def with_space(description: str, job: Callable[[Settings, SweepSettings, Any], object]) -> None:
    """Run a job with a space file, its sweep's settings, and those that all trials share: of the file, then the command line.
    Exits as :func:`guarded` does."""
    made = parser(description)
    made.add_argument("--space", type=str, help="YAML file of the space: see tune_spaces/ (required)")
    made.add_argument("--sweep", type=SweepSettings, default=SweepSettings())
    words = sys.argv[1:]

    def run() -> object:
        from ask_ray.tuning import space  # it needs Ray: --help need not wait for it

        file = space.read(str(path))
        file.check()
        of_file = yaml.safe_dump({**file.settings, "sweep": file.sweep}, allow_unicode=True)
        over = {word.partition("=")[0].removeprefix("--") for word in words}  # of these, the file's lines are not to blame
        file = replace(file, lines={key: line for key, line in file.lines.items() if key not in over})
        try:
            settings, found = parsed(made, [f"--config={of_file}", *words])
        except SettingsError as error:
            raise SettingsError(file.tied(str(error))) from error
        try:
            return job(settings, SweepSettings.model_validate(plain(found["sweep"])), file)
        except ValidationError as error:
            raise SettingsError(file.located(f"sweep.{describe(error)}")) from error
        except SettingsError as error:
            raise type(error)(file.located(str(error))) from error

    path = _value(words, "--space")
    if path is None:
        parse(made, words)  # for --help, and for errors of its own
        made.error("--space is missing: name a file, such as tune_spaces/smoke.yaml")
    guarded(run)


def _value(words: Sequence[str], wanted: str) -> str | None:
    """The value of a flag, None if it does not stand there."""
    rest = iter(words)
    for word in rest:
        flag, separator, value = word.partition("=")
        if flag == wanted:
            return value if separator else next(rest, None)
    return None


def corpus_in_full(words: Sequence[str]) -> list[str]:
    """The short forms ``--corpus NAME``, ``--path PLACE`` and ``--out PLACE`` as ``--data.corpus NAME``,
    ``--data.NAME.path PLACE`` and ``--data.prepared PLACE``; all other words as they are.

    Exits with 2 if ``--path`` stands without a ``--corpus`` that reads one.
    """
    short: dict[str, str] = {}
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, separator, value = word.partition("=")
        if flag in ("--corpus", "--path", "--out"):
            short[flag] = value if separator else next(rest, "")
        else:
            others.append(word)
    corpus = short.get("--corpus", "")
    if "--path" in short and corpus in ("", "soundscapes"):
        sys.stderr.write("error: --path is the folder of a corpus: name the corpus, such as --corpus audiocaps\n")
        raise SystemExit(2)
    full = {"--corpus": "--data.corpus", "--path": f"--data.{corpus}.path", "--out": "--data.prepared"}
    return [f"{full[flag]}={value}" for flag, value in short.items()] + others


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
