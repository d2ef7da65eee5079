"""Processes that misbehave once, on order: real actors and workers whose code goes wrong, without a switch in the product.

Ray runs :func:`install` at the start of every worker process of the session. An order is an empty file, named by what is
to go wrong, in the folder that the environment names; the first process that can carry it out does, and removes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import wrapt

#: Environment variable: the folder of orders.
ORDERS = "ASK_RAY_TEST_ORDERS"


def order(what: str) -> None:
    """Have the next unit that is encoded go wrong: `raise`, `exit` (cleanly) or `few` (a row is missing); `diverge`: the
    next step leaves a weight that is not a number; `corrupt`: the next weights that are sent for encoding hold one; `fill`:
    storage is full when the first file of the next version is there; or `die`: the next worker to swap is killed at it."""
    (Path(os.environ[ORDERS]) / what).touch()


def carried_out(what: str) -> bool:
    """Whether an order is no longer waiting."""
    return not (Path(os.environ[ORDERS]) / what).exists()


def install() -> None:
    """Make this process heed orders, as soon as what they are about is imported."""
    wrapt.register_post_import_hook(_heed_encoder, "ask_ray.knowledge.encoding")
    wrapt.register_post_import_hook(_heed_stepper, "ask_ray.training.step")
    wrapt.register_post_import_hook(_heed_requests, "ask_ray.knowledge.requests")
    wrapt.register_post_import_hook(_heed_storage, "ask_ray.storage")
    wrapt.register_post_import_hook(_heed_swap, "ask_ray.knowledge.replica")


def _heed_swap(module: ModuleType) -> None:
    swap = module.Replica.swap

    @functools.wraps(swap)
    def call(self, version):
        if _taken("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        swap(self, version)

    module.Replica.swap = call


def _heed_storage(module: ModuleType) -> None:
    upload = module.Folder.upload

    @functools.wraps(upload)
    def call(self, source):
        if not _taken("fill"):
            return upload(self, source)
        with tempfile.TemporaryDirectory() as begun:
            shutil.copy(min(source.iterdir()), begun)
            upload(self, Path(begun))
        with _full():
            return upload(self, source)

    module.Folder.upload = call


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """This process may meanwhile write no file of more than 16 KiB: the kernel refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _heed_requests(module: ModuleType) -> None:
    ask = module.Requests.ask

    @functools.wraps(ask)
    def call(self, step, reason, weights, urgent=False):
        if _taken("corrupt"):
            next(iter(weights.values())).view(-1)[0] = float("nan")
        ask(self, step, reason, weights, urgent)

    module.Requests.ask = call


def _heed_stepper(module: ModuleType) -> None:
    take = module.Stepper.take

    @functools.wraps(take)
    def call(self, *arguments):
        made = take(self, *arguments)
        if _taken("diverge"):
            next(self._model.parameters()).data.view(-1)[0] = float("nan")
        return made

    module.Stepper.take = call


def _heed_encoder(module: ModuleType) -> None:
    encode = module.Encoder.__call__

    @functools.wraps(encode)
    def call(self, batch):
        if _taken("raise"):
            raise RuntimeError("an encoder that was told to raise")
        if _taken("exit"):
            sys.exit(0)
        made = encode(self, batch)
        return {name: column[:-1] for name, column in made.items()} if _taken("few") else made

    module.Encoder.__call__ = call


def _taken(what: str) -> bool:
    """Whether this process is the one that carries an order out."""
    try:
        (Path(os.environ[ORDERS]) / what).unlink()
    except FileNotFoundError:
        return False
    return True
