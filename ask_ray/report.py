"""The pictures of a run, from its journal: curves of loss and recall, drift over steps, refreshes against training."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ask_ray.modality import Modality, headings
from ask_ray.storage import Folder

Events = list[dict[str, Any]]

#: One colour a meaning, in every picture (Okabe and Ito's set, which colour-blind readers tell apart).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def refreshes(events: Events) -> list[dict[str, Any]]:
    """One row for each version that training swapped in, in the order of the swaps.

    `swap_step` and `lag_steps` are in training steps, `swap_ms` is the slowest rank's; `ranks` counts the workers that
    swapped. A version that a restart made training swap in again has its last swap, by the workers that were left.
    """
    published = {event["version"]: event for event in events if event["kind"] == "published"}
    rows = []
    for version in sorted(published):
        last = _last_swaps(events, version)
        if not last:
            continue
        made = published[version]
        rows.append(
            {
                "version": version,
                "encoder_step": made["encoder_step"],
                "swap_step": max(event["step"] for event in last),
                "lag_steps": max(event["lag_steps"] for event in last),
                "encode_seconds": made["encode_seconds"],
                "build_seconds": made["build_seconds"],
                "swap_ms": max(event["swap_ms"] for event in last),
                "entries": made["entries"],
                "ranks": len(last),
                "reason": made["reason"],
            }
        )
    return rows


def _last_swaps(events: Events, version: int) -> Events:
    """Each rank's swap to a version where training swapped it in last; none if it never did.

    All ranks swap at one step. An earlier attempt may have swapped at that step too, with ranks that the last did not have.
    """
    swaps = [event for event in events if event["kind"] == "swapped" and event["version"] == version]
    if not swaps:
        return []
    last = next((event for event in reversed(swaps) if event["rank"] == 0), swaps[-1])  # a journal that died has lost some
    workers = [event["world_size"] for event in events[: events.index(last)] if event["kind"] == "began"]
    ranks = workers[-1] if workers else math.inf
    return [*{event["rank"]: event for event in swaps if event["step"] == last["step"] and event["rank"] < ranks}.values()]


def validations(events: Events) -> Events:
    """The events that hold figures of the validation split, `t2a_r1` and the like, by step: epochs that the workers evaluated
    themselves and evaluations beside training. Where training began again at an earlier step, those after it are of weights that
    are gone, and left out."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "began":
            found = {step: of for step, of in found.items() if step <= event["step"]}
        elif event["kind"] in ("epoch", "validated") and "t2a_r1" in event:
            found[event["step"]] = event
    return [found[step] for step in sorted(found)]


def draw(folder: Folder, events: Events, result: dict[str, Any]) -> list[str]:
    """Draw all pictures that the run has data for into ``<folder>/pictures``.

    Returns:
        their places.
    """
    modality = result.get("modality", "audio")
    made = {"curves.png": curves(events, result), "drift.png": drift(events, modality), "refreshes.png": timeline(events)}
    places = []
    for name, figure in made.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, bbox_inches="tight")
        plt.close(figure)
        (folder / "pictures").write(name, buffer.getvalue())
        places.append(str(folder / "pictures" / name))
    return places


def _by_step(events: Events, kind: str) -> Events:
    """The last event of each step: steps that a restart repeated count once."""
    found = {event["step"]: event for event in events if event["kind"] == kind}
    return [found[step] for step in sorted(found)]


def _plot(axes: Axes, events: Events, key: str, label: str, colour: str, marker: str = "") -> None:
    points = [(event["step"], event[key]) for event in events if key in event and np.isfinite(event[key])]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.6)


def _finished(axes: Axes, title: str, ylabel: str) -> None:
    axes.set(title=title, xlabel="training step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _mark_swaps(axes: Axes, events: Events) -> None:
    for number, row in enumerate(refreshes(events)):
        label = "swap to a fresh version" if number == 0 else None
        axes.axvline(row["swap_step"], color=GREY, linestyle=":", linewidth=1, label=label)


def curves(events: Events, result: dict[str, Any]) -> Figure | None:
    """Loss of both directions, and recall on the validation split with the final test figures."""
    epochs = _by_step(events, "epoch")
    if not epochs:
        return None
    names = headings(result.get("modality", "audio"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    _plot(left, _by_step(events, "step"), "loss", "objective, single steps", GREY)
    _plot(left, epochs, "loss", "objective", BLUE)
    _plot(left, epochs, "loss_a2t", names["a2t"], ORANGE)
    _plot(left, epochs, "loss_t2a", names["t2a"], GREEN)
    _finished(left, "Loss", "nats")
    validated = validations(events)
    for (way, name), colour in zip(names.items(), (GREEN, ORANGE), strict=True):
        clips = next((event[f"{way}_n"] for event in validated if f"{way}_n" in event), 0)
        _plot(right, validated, f"{way}_r1", f"{name}, validation (N = {clips})", colour, "o")
        of = result.get("final", {}).get(way)
        if of:
            right.plot(epochs[-1]["step"], of["r1"], "*", color=colour, markersize=13, label=f"{name}, test (N = {of['n']})")
    _finished(right, "Recall at 1", "share of queries")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    return figure


def drift(events: Events, modality: Modality = "audio") -> Figure | None:
    """Representation drift (RDM) over steps with the swaps marked."""
    steps, epochs = _by_step(events, "step"), _by_step(events, "epoch")
    if not any("rdm_audio" in event for event in steps):
        return None
    figure, axes = plt.subplots(figsize=(11, 4))
    _plot(axes, steps, "rdm_audio", f"{modality}, the batch's own entries", BLUE)
    _plot(axes, steps, "rdm_text", "text, the batch's own entries", ORANGE)
    _plot(axes, epochs, "probe_rdm_audio", f"{modality}, re-encoded probe", BLUE, "s")
    _plot(axes, epochs, "probe_rdm_text", "text, re-encoded probe", ORANGE, "s")
    _mark_swaps(axes, events)
    _finished(axes, "Representation drift mismatch of the knowledge base in use", "RDM in nats")
    axes.set_ylim(bottom=0)
    return figure


def timeline(events: Events) -> Figure | None:
    """Refreshes against training, in seconds: what the pool encoded and built while workers stepped, and every swap."""
    published = [event for event in events if event["kind"] == "published"]
    steps = [event for event in events if event["kind"] in ("step", "epoch")]
    if not published or not steps:
        return None
    zero = min(event["time"] for event in events)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5), sharex=True, height_ratios=[2, 1])
    ordered = sorted(steps, key=lambda event: event["time"])
    top.plot([event["time"] - zero for event in ordered], [event["step"] for event in ordered], color=BLUE, linewidth=1.6)
    swaps = [event for event in events if event["kind"] == "swapped"]
    for rank in sorted({event["rank"] for event in swaps}):
        mine = [event for event in swaps if event["rank"] == rank]
        top.plot(
            [event["time"] - zero for event in mine], [event["step"] for event in mine], "o" if rank == 0 else "x",
            color=RED if rank == 0 else "black", markersize=9 - 2 * min(rank, 2), label=f"swap on worker {rank}", linestyle="",
        )  # fmt: skip
    for event in published:
        start = event["started"] - zero
        bottom.barh(0, event["encode_seconds"], left=start, color=ORANGE, height=0.6)
        bottom.barh(0, event["build_seconds"], left=start + event["encode_seconds"], color=GREEN, height=0.6)
        bottom.text(start, 0.38, f"v{event['version']}", fontsize=8)
    top.set(ylabel="training step", title="Training goes on while the knowledge base is re-encoded")
    if swaps:
        top.legend(frameon=False)
    top.grid(alpha=0.25)
    bottom.set(xlabel="seconds", yticks=[0], yticklabels=["refresh"], ylim=(-0.6, 0.8))
    for label, colour in (("encoding (actor pool)", ORANGE), ("prototypes and index", GREEN)):
        bottom.barh(0, 0, color=colour, label=label)
    bottom.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, -0.35))
    figure.tight_layout()
    return figure
