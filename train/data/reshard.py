"""Resumes with another number of streams (ranks x workers): splits the remaining epoch among the new ones.

What one stream reads of an epoch depends on the number of streams. When it changes, everything that the old streams
have not read, up to the end of the most advanced one's epoch, becomes one list of shard slices, which the new streams
split like the shards of an epoch; the next epoch is an ordinary one. A partly consumed shuffle buffer is read again as
a whole, so some of its samples are repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..config import DataConfig
from .stream import Cursor, EpochPlan, Mixture, Remainder, ShardSlice, load_remainder, split_count, split_slices


def reshard(
    states: Sequence[dict[str, Any] | None], num_streams: int, data: DataConfig, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """The states of `num_streams` streams that continue those of `states`, and the number of repeated samples.

    Args:
        states: of all streams in order, as `StepLoader` keeps them; None for one that has no steps yet.
    """
    before = [Mixture(data.sources, data.shuffle_buffer, seed, stream, len(states)) for stream in range(len(states))]
    mixtures = [
        state["mixture"] if state is not None else mixture.state_dict() for state, mixture in zip(states, before)
    ]
    counts = sum((Counter(state["counts"]) for state in states if state is not None), Counter())
    num_repeated = 0
    sources: list[list[dict[str, Any]]] = []  # [source][new stream]
    for index in range(len(data.sources)):
        plans = [mixture.sources[index].plan for mixture in before]
        remainder, num_again = _remaining(plans, [mixture["sources"][index] for mixture in mixtures])
        num_repeated += num_again
        sources.append([_initial_state(remainder, stream, num_streams) for stream in range(num_streams)])
    documents = _waiting([state.get("documents", {}) for state in states if state is not None])
    after = [
        {
            "documents": {source: chunks[stream::num_streams] for source, chunks in documents.items()},
            "mixture": {
                "drawn": [0] * len(data.sources),
                "target": [0.0] * len(data.sources),
                "sources": [source[stream] for source in sources],
            },
            "counts": {name: split_count(count, stream, num_streams) for name, count in counts.items()},
        }
        for stream in range(num_streams)
    ]
    return after, num_repeated


def _waiting(states: Sequence[dict[int, list[Any]]]) -> dict[int, list[Any]]:
    """The documents of all streams that are not yet used up, by source; see `Documents.state_dict`."""
    return {
        source: [chunk for state in states for chunk in state.get(source, [])] for state in states for source in state
    }


def _remaining(plans: Sequence[EpochPlan], states: Sequence[dict[str, Any]]) -> tuple[Remainder, int]:
    """What all streams have not read of a source up to the end of the latest epoch, and how much of it is repeated."""
    last = max(state["start"]["epoch"] for state in states)
    slices: list[ShardSlice] = []
    quota: int | None = 0
    num_repeated = 0
    for plan, state in zip(plans, states):
        if state["is_empty"]:
            continue
        plan = replace(plan, remainder=load_remainder(state))
        is_consumed = state["position"] == state["window"]
        cursor = Cursor(**state["next" if is_consumed else "start"])
        num_repeated += 0 if is_consumed else state["position"]
        for epoch in range(cursor.epoch, last + 1):
            remaining = plan.slices(epoch)[cursor.slice_index :]
            slices += [piece.skip(cursor.offset) for piece in remaining[:1]] + remaining[1:]
            full = plan.quota(epoch)
            quota = None if full is None or quota is None else quota + full - cursor.taken
            cursor = Cursor(epoch + 1)
    return Remainder(last, slices, quota), num_repeated


def _initial_state(remainder: Remainder, stream: int, num_streams: int) -> dict[str, Any]:
    """The state of a `SourceStream` at the beginning of its part of the remainder."""
    slices = split_slices(remainder.slices, stream, num_streams)
    part = Remainder(remainder.epoch, slices, split_count(remainder.quota, stream, num_streams)).state_dict()
    cursor = asdict(Cursor(remainder.epoch))
    return {"start": cursor, "next": cursor, "position": 0, "window": 0, "is_empty": False, "remainder": part}
