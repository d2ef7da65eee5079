"""Search a run's knowledge base: a text finds clips or pictures, a file of one finds captions.

python jobs/search.py "a dog barks"                         the newest run in ./runs
python jobs/search.py --run runs/my-run recording.wav --top 5
"""

from __future__ import annotations

from ask_ray.command import with_arguments


def search(query: str, run: str | None, storage: str, top: int) -> None:
    """Search and print a ranked list."""
    from ask_ray import inspection

    inspection.search(query, run, storage, top)


if __name__ == "__main__":
    with_arguments(
        __doc__ or "",
        search,
        query={"positional": True, "help": "a text, or the path of an audio file or, of a run on pictures, of a picture"},
        run={"type": str, "default": None, "help": "folder of the run; unset: the newest in --storage"},
        storage={"type": str, "default": "runs", "help": "folder that holds the runs"},
        top={"type": int, "default": 10, "help": "how many results"},
    )
