"""Which requests are prefilled next: short prompts do not wait for long ones, and every client gets its share of slots.

Every third prefill turn is for the oldest work, so that nothing waits for ever, and the others for the shortest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

from .prefill import Prefill
from .request import Request

_OLDEST_EVERY = 3  # turns: beside long prompts a short one then takes about half as long again as alone


class Scheduler:
    """The requests that wait for a slot, and those whose prompts are being prefilled.

    Args:
        new_prefill: begins the prefill of some requests.
        num_uncached: how many tokens of a request's prompt are to be computed.
    """

    def __init__(
        self, new_prefill: Callable[[Sequence[Request]], Prefill], num_uncached: Callable[[Request], int]
    ) -> None:
        self._num_uncached = num_uncached
        self.waiting: list[Request] = []  # in the order of their arrival
        self.prefills: list[Prefill] = []
        self._new_prefill = new_prefill
        self._num_turns = 0

    @property
    def has_cancelled(self) -> bool:
        """Whether `drop_cancelled` has something to drop."""
        return any(request.is_cancelled for request in self.waiting) or any(map(_is_cancelled, self.prefills))

    @property
    def num_prefilling(self) -> int:
        return sum(len(prefill.requests) for prefill in self.prefills)

    def next_prefill(
        self, running: Sequence[Request], max_tokens: int, max_batch_size: int | None = None
    ) -> Prefill | None:
        """The prefill whose turn it is; None where there is no prompt to prefill, or no slot for it.

        Args:
            running: the requests that are prefilled already, and have a slot.
            max_tokens: of several prompts that are prefilled together.
            max_batch_size: slots; None for no limit.
        """
        prefilling = [request for prefill in self.prefills for request in prefill.requests]
        num_free = None if max_batch_size is None else max_batch_size - len(running) - len(prefilling)
        startable = self._startable(num_free, [*running, *prefilling])
        if not startable and not self.prefills:
            return None
        is_oldest_turn = self._num_turns % _OLDEST_EVERY == 0
        self._num_turns += 1
        lengths = {request: self._num_uncached(request) for request in startable}
        if is_oldest_turn:
            prefill = min(self.prefills, key=_arrival, default=None)
            first = min(startable, key=lambda request: request.id, default=None)
            is_new = first is not None and (prefill is None or first.id < _arrival(prefill))
        else:
            prefill = min(self.prefills, key=lambda prefill: prefill.num_remaining, default=None)
            first = min(startable, key=lengths.__getitem__, default=None)
            is_new = first is not None and (prefill is None or lengths[first] < prefill.num_remaining)
        if not is_new:
            assert prefill is not None
            return prefill
        assert first is not None
        group = _group(first, lengths, max_tokens)
        self.waiting = [request for request in self.waiting if request not in group]
        return self.add(group)

    def add(self, requests: Sequence[Request]) -> Prefill:
        """Begin a prefill."""
        prefill = self._new_prefill(requests)
        self.prefills.append(prefill)
        return prefill

    def drop_cancelled(self) -> None:
        """Forget the waiting requests that were cancelled, and prefills of which no request is left."""
        self.waiting = [request for request in self.waiting if not request.is_cancelled]
        self.prefills = [prefill for prefill in self.prefills if not _is_cancelled(prefill)]

    def _startable(self, num_free: int | None, started: Sequence[Request]) -> list[Request]:
        """As many waiting requests as there are free slots, of those clients first that hold the fewest."""
        if num_free is None or num_free >= len(self.waiting):
            return list(self.waiting)
        held: Counter[Hashable] = Counter(request.client for request in started)
        remaining, startable = list(self.waiting), []
        for _ in range(num_free):
            request = min(remaining, key=lambda request: (held[request.client], request.id))
            remaining.remove(request)
            held[request.client] += 1
            startable.append(request)
        return startable


def _group(first: Request, lengths: Mapping[Request, int], max_tokens: int) -> list[Request]:
    """Requests to prefill with the first one, the nearest in length first; padded they have `max_tokens` at most."""
    group, longest = [first], lengths[first]
    others = (request for request in lengths if request is not first)
    for request in sorted(others, key=lambda request: (abs(lengths[request] - lengths[first]), request.id)):
        longest = max(longest, lengths[request])
        if longest * (len(group) + 1) > max_tokens:
            break
        group.append(request)
    return sorted(group, key=lambda request: request.id)


def _arrival(prefill: Prefill) -> int:
    return min(request.id for request in prefill.requests)


def _is_cancelled(prefill: Prefill) -> bool:
    return all(request.is_cancelled for request in prefill.requests)
