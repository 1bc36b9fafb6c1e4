"""Admission: which images `HandleClient` sends to the replicas now, which wait, and which are refused."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..protocol.errors import QueueFull
from ..protocol.fair_queue import FairQueue

RETRY_AFTER_S = 5.0  # if the queue is full and no images have been completed
MAX_CLIENT_SHARE = 7 / 8  # share of the free places that a client can take with several requests


class Completions:
    """Measures the time between completed images while there is work.

    Args:
        clock: returns the time in seconds.
        number: of the most recent completions that count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, number: int = 16) -> None:
        self._clock, self._intervals_s = clock, deque[float](maxlen=number)
        self._since = clock()

    def start(self) -> None:
        """Work arrived after an idle time."""
        self._since = self._clock()

    def add(self) -> None:
        """An image was completed."""
        self._intervals_s.append(self._clock() - self._since)
        self.start()

    def interval_s(self) -> float:
        """Expected seconds until the next completion, in [1, 600]; `RETRY_AFTER_S` before the first completion.

        The mean of the recent intervals, or the current one if it is longer already.
        """
        if not self._intervals_s:
            return RETRY_AFTER_S
        mean_s = sum(self._intervals_s) / len(self._intervals_s)
        return min(600.0, max(1.0, mean_s, self._clock() - self._since))


@dataclass(eq=False)
class Reservation:
    """Places for `number` images of a client that have not arrived yet."""

    client: str
    number: int


@dataclass(eq=False)
class Ticket:
    """The place of an image, from its arrival to its end.

    Attributes:
        client: the sender; clients share the queue equally.
        sent_at: when it was sent to the replicas; None while it waits here.
        answered: a replica has accepted the image.
    """

    client: str
    sent_at: float | None = None
    answered: bool = False


@dataclass
class Admission:
    """Places for images: as many as the replicas hold are sent, `max_queued` more wait here, others are refused.

    Waiting images are sent in the order of a `FairQueue`. So that a client cannot fill the server, it can take at most
    `MAX_CLIENT_SHARE` of the places that others have left, rounded up.

    Attributes:
        places: number of images that the running replicas hold.
        max_queued: number of images that wait here.
        blocked_s: if a replica has not accepted an image within this time, the replicas are full, for example with the
            images of another process of the HTTP interface. Until then, no further images are sent.
        clock: returns the time in seconds.
    """

    places: Callable[[], float] = lambda: math.inf
    max_queued: float = math.inf
    blocked_s: float = 0.25
    clock: Callable[[], float] = time.monotonic
    completions: Completions = field(default_factory=Completions)
    _reserved: list[Reservation] = field(default_factory=list)
    _waiting: FairQueue[Ticket] = field(default_factory=FairQueue)
    _sent: list[Ticket] = field(default_factory=list)  # in order of `sent_at`

    @contextmanager
    def reserve(self, number: int, client: str) -> Iterator[Reservation]:
        """Hold places for images that are about to arrive.

        Raises:
            QueueFull: there are not enough places.
        """
        self._check(number, client)
        reservation = Reservation(client, number)
        self._reserved.append(reservation)
        try:
            yield reservation
        finally:
            self._reserved.remove(reservation)

    def enter(self, client: str, cost: float, reservation: Reservation | None = None) -> Ticket:
        """The place of a new image.

        Raises:
            QueueFull: there is no place, and `reservation` has none either.
        """
        if reservation is not None and reservation.number:
            reservation.number -= 1
        else:
            self._check(1, client)
        if not self._sent and not self._waiting:
            self.completions.start()
        ticket = Ticket(client)
        self._waiting.add(ticket, client, cost)
        self.send()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The image has ended."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket in self._sent:
            self._sent.remove(ticket)
        self.send()

    def send(self) -> None:
        """Mark waiting images as sent while there are places. Call this regularly: the number of places can change."""
        while self._waiting and len(self._sent) < self._num_places():
            ticket = self._waiting.popleft()
            ticket.sent_at = self.clock()
            self._sent.append(ticket)

    def num_ahead(self, ticket: Ticket) -> int:
        """Images that no replica has accepted and that are sent before this one."""
        unanswered = [*(other for other in self._sent if not other.answered), *self._waiting]
        return unanswered.index(ticket)

    def _num_places(self) -> float:
        oldest = next((ticket for ticket in self._sent if not ticket.answered), None)
        if oldest is not None and oldest.sent_at is not None and self.clock() - oldest.sent_at > self.blocked_s:
            return min(self.places(), len(self._sent))
        return self.places()

    def _check(self, number: int, client: str) -> None:
        clients = [*(ticket.client for ticket in (*self._sent, *self._waiting))]
        own = clients.count(client) + sum(r.number for r in self._reserved if r.client == client)
        total = len(clients) + sum(r.number for r in self._reserved)
        free = self._num_places() + self.max_queued - (total - own)  # for this client
        if own + number <= (math.ceil(free * MAX_CLIENT_SHARE) if own and free < math.inf else free):
            return
        retry_after_s = self.completions.interval_s()
        raise QueueFull(
            f"the server's queue is full ({total} images, {own} of this client); try again in "
            f"{math.ceil(retry_after_s)} s.",
            retry_after_s,
        )
