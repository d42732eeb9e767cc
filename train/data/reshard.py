"""Going on with another number of streams (ranks x workers): what is left of each epoch is shared out anew.

Each stream reads a part of an epoch that only depends on how many streams there are. When that number changes, all that
the old streams have not read of the epoch that the foremost is in becomes one list of shares, and the new streams take
from it as they would from the shards of an epoch; the next epoch is an ordinary one. A shuffle buffer that was given
out in part is given out again as a whole: shards are read forwards, and which of its samples were out only its order
tells. Called by data.py; calls stream.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..config import DataConfig
from .stream import Cursor, Epochs, Mixture, Rest, Share, rest_of, share_of, share_out


def reshare(
    states: Sequence[dict[str, Any] | None], num_streams: int, data: DataConfig, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """The states of `num_streams` streams that go on where those of `states` stood, and how many samples come again.

    Args:
        states: of all streams in order, as data.py keeps them; None for one that had not begun.
    """
    before = [Mixture(data.sources, data.shuffle_buffer, seed, stream, len(states)) for stream in range(len(states))]
    mixtures = [
        state["mixture"] if state is not None else mixture.state_dict() for state, mixture in zip(states, before)
    ]
    counts = sum((Counter(state["counts"]) for state in states if state is not None), Counter())
    num_again = 0
    sources: list[list[dict[str, Any]]] = []  # [source][new stream]
    for index in range(len(data.sources)):
        rest, again = _left(
            [mixture.sources[index].epochs for mixture in before], [mixture["sources"][index] for mixture in mixtures]
        )
        num_again += again
        sources.append([_begin(rest, stream, num_streams) for stream in range(num_streams)])
    after = [
        {
            "mixture": {"drawn": [0] * len(data.sources), "sources": [source[stream] for source in sources]},
            "counts": {name: share_of(count, stream, num_streams) for name, count in counts.items()},
        }
        for stream in range(num_streams)
    ]
    return after, num_again


def _left(epochs: Sequence[Epochs], states: Sequence[dict[str, Any]]) -> tuple[Rest, int]:
    """What all streams have left of a source up to the end of the foremost's epoch; how much of it they gave out."""
    last = max(state["start"]["epoch"] for state in states)
    shares: list[Share] = []
    quota: int | None = 0
    num_again = 0
    for own, state in zip(epochs, states):
        if state["is_empty"]:
            continue
        own = replace(own, rest=rest_of(state))
        is_through = state["position"] == state["window"]
        cursor = Cursor(**state["next" if is_through else "start"])
        num_again += 0 if is_through else state["position"]
        for epoch in range(cursor.epoch, last + 1):
            left = own.shares(epoch)[cursor.share :]
            shares += [share.behind(cursor.offset) for share in left[:1]] + left[1:]
            full = own.quota(epoch)
            quota = None if full is None or quota is None else quota + full - cursor.taken
            cursor = Cursor(epoch + 1)
    return Rest(last, shares, quota), num_again


def _begin(rest: Rest, stream: int, num_streams: int) -> dict[str, Any]:
    """The state of a source's stream at the beginning of its part of what is left."""
    own = Rest(rest.epoch, share_out(rest.shares, stream, num_streams), share_of(rest.quota, stream, num_streams))
    cursor = asdict(Cursor(rest.epoch))
    return {"start": cursor, "next": cursor, "position": 0, "window": 0, "is_empty": False, "rest": own.state_dict()}
