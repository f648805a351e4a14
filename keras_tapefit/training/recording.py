"""The records of steps that a model keeps, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from keras_tapefit.update.records import Records, make_counter
from keras_tapefit.update.watch import RecordRequest


class Recording:
    """The requests of callbacks, and the records made for them.

    Without a request there are none, and nothing is added to a step.

    Attributes:
        records: those that are written now; `None` where nobody asks for any.
        counter: the number of steps so far, a variable; `None` before the first request.
    """

    def __init__(self) -> None:
        self._requests: WeakKeyDictionary[Any, RecordRequest] = WeakKeyDictionary()
        # As long as a trace writes them.
        self._kept: WeakValueDictionary[Any, Records] = WeakValueDictionary()
        self.records: Records | None = None
        self.counter: Any = None

    def ask(self, who: Any, request: RecordRequest) -> None:
        """Has steps recorded from the next call of the train function on.

        Args:
            who: for whom, with a method `detach`. The request ends with its life at the
                latest.
            request: what is wanted.
        """
        self._requests[who] = request

    @property
    def is_asked(self) -> bool:
        """Whether anybody wants records."""
        return len(self._requests) > 0

    def release(self, who: Any) -> None:
        """Ends the request of `who`."""
        self._requests.pop(who, None)

    def end(self) -> None:
        """Ends all requests: those that a training which broke off has left."""
        for who in list(self._requests):
            who.detach()

    def structure(self) -> Any:
        """Returns what of the records decides the traced graph, which keeps them by it."""
        return self.records

    def prepare(
        self, variables: Sequence[Any], steps_per_execution: int, entries: tuple[str, ...] = ()
    ) -> None:
        """Makes the records that are asked for, in the strategy's scope."""
        requests = list(self._requests.values())
        if not requests:
            self.records = None
            return
        request = reduce(RecordRequest.merged, requests)
        key = request, 2 * steps_per_execution, tuple(map(id, variables)), entries
        if self.counter is None:
            self.counter = make_counter(0)
        self.records = self._kept.get(key)
        if self.records is None:
            self.records = Records(request, variables, self.counter, key[1], entries)
            self._kept[key] = self.records

    def begin(self, num_steps: int) -> None:
        """Counts the steps that were made while nobody asked for records.

        Args:
            num_steps: the number of steps of training so far.
        """
        if int(self.counter.numpy()) < num_steps:
            self.counter.assign(num_steps)
