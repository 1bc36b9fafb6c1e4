"""Who is served next: clients share a queue equally, a full server refuses at once, and a client is its address."""

import random

import pytest

from serving.clients.admission import RETRY_AFTER_S, Admission, Completions
from serving.http.client_address import client_address
from serving.protocol.errors import QueueFull
from serving.protocol.fair_queue import FairQueue


def served(queue: FairQueue) -> str:
    return "".join(queue.popleft() for _ in range(len(queue)))


def test_items_of_one_client_are_first_in_first_out():
    """Whatever their costs, items of one client keep their order."""
    queue: FairQueue[str] = FairQueue()
    for item in "abcd":
        queue.add(item, "client", cost=random.random())
    assert list(queue) == list("abcd") and queue[0] == "a" and "c" in queue
    queue.remove("b")
    assert served(queue) == "acd"


def test_one_item_is_not_behind_a_hundred_of_another_client():
    """A single item is served second, because no item overtakes the first one; then the others continue."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.add("x", "many")
    queue.add("y", "one")
    assert served(queue)[:3] == "xyx"


@pytest.mark.parametrize("costs,share", [((1, 1), 0.5), ((1, 3), 0.75), ((5, 1), 1 / 6)])
def test_clients_get_equal_work(costs, share):
    """Two clients with many items get the same total cost, so the number of items is inversely proportional to it."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(120):
        queue.add("a", "a", costs[0])
        queue.add("b", "b", costs[1])
    first = [queue.popleft() for _ in range(96)]
    assert abs(first.count("a") / 96 - share) < 0.03


def test_idle_time_gives_no_credit():
    """A client that was idle while others were served shares equally from its arrival on."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.add("a", "a")
    for _ in range(50):
        queue.popleft()
    for _ in range(50):
        queue.add("b", "b")
    assert served(queue)[1:41].count("b") in (20, 21)


def test_a_returned_item_is_the_first():
    """An item that did not fit into memory returns to the head, and no other item overtakes it."""
    queue: FairQueue[str] = FairQueue()
    queue.add("a", "a")
    queue.add("b", "a")
    queue.appendleft(queue.popleft(), "a")
    queue.add("c", "c")
    assert served(queue) == "acb"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(places=4, max_queued=4, clock=None) -> Admission:
    return Admission(places=lambda: places, max_queued=max_queued, clock=clock or Clock())


def test_a_full_server_refuses_at_once():
    """As many images as fit are sent, `max_queued` wait in order, and further ones are refused until one ends."""
    full = admission(2, 3)
    tickets = [full.enter(str(client), 1) for client in range(5)]
    assert [ticket.sent_at is not None for ticket in tickets] == [True, True, False, False, False]
    assert [full.num_ahead(ticket) for ticket in tickets] == [0, 1, 2, 3, 4]
    with pytest.raises(QueueFull, match="5 images, 0 of this client") as refused:
        full.enter("another", 1)
    assert refused.value.retry_after_s == RETRY_AFTER_S
    with pytest.raises(QueueFull), full.reserve(1, "another"):
        pass
    full.leave(tickets[0])
    assert tickets[2].sent_at is not None
    full.enter("another", 1)


def test_the_number_of_places_follows_the_running_replicas():
    """With fewer replicas than the maximum, only their places count; when a replica starts, waiting images are sent."""
    replicas = [1]
    scaled = Admission(places=lambda: 2 * replicas[0], max_queued=2, clock=Clock())
    tickets = [scaled.enter(str(client), 1) for client in range(4)]
    with pytest.raises(QueueFull):
        scaled.enter("another", 1)
    replicas[0] = 2
    scaled.send()
    assert all(ticket.sent_at is not None for ticket in tickets)
    scaled.enter("another", 1)


def test_replicas_that_are_full_with_images_of_others():
    """If no replica accepts an image in time, no more are sent, and images beyond `max_queued` are refused."""
    clock = Clock()
    shared = admission(8, 2, clock)
    sent = [shared.enter(str(client), 1) for client in range(3)]
    for ticket in sent[:2]:
        ticket.answered = True
    clock.now = 1.0
    waiting = [shared.enter(str(client), 1) for client in range(3, 5)]
    assert [ticket.sent_at for ticket in waiting] == [None, None]
    with pytest.raises(QueueFull):
        shared.enter("another", 1)
    sent[2].answered = True
    shared.send()
    assert all(ticket.sent_at is not None for ticket in waiting)


def test_one_client_cannot_fill_the_server():
    """A client that sends as much as it can leaves places for others."""
    shared = admission(8, 8)

    def fill(client: str) -> int:
        number = 0
        try:
            while True:
                shared.enter(client, 1)
                number += 1
        except QueueFull:
            return number

    assert [fill(client) for client in "abc"] == [14, 2, 0]


def test_one_request_is_sent_next_beside_many_of_another_client():
    """With a full server, the image of a second client is sent after at most one more of the first."""
    shared = admission(2, 20)
    many = [shared.enter("many", 1) for _ in range(19)]
    one = shared.enter("one", 1)
    shared.leave(many[0])
    shared.leave(many[1])
    assert one.sent_at is not None and sum(ticket.sent_at is not None for ticket in many) == 3


def test_reserved_places_are_used_by_their_images():
    """Images with a reservation take its places; what is left of it is free again when it ends."""
    shared = admission(2, 2)
    with shared.reserve(2, "a") as reservation:
        shared.enter("b", 1)
        shared.enter("c", 1)
        with pytest.raises(QueueFull):
            shared.enter("d", 1)
        shared.enter("a", 1, reservation)
        assert reservation.number == 1
    shared.enter("d", 1)
    with pytest.raises(QueueFull):
        shared.enter("e", 1)


def test_the_retry_delay_is_the_time_between_completions():
    """Idle time does not count; a current interval that is longer than the mean does."""
    clock = Clock()
    completions = Completions(clock)
    assert completions.interval_s() == RETRY_AFTER_S
    clock.now += 3600
    completions.start()
    for _ in range(4):
        clock.now += 7
        completions.add()
    assert completions.interval_s() == 7
    clock.now += 20
    assert completions.interval_s() == 20
    clock.now += 3600
    assert completions.interval_s() == 600


@pytest.mark.parametrize(
    "client,headers,header,expected",
    [
        (("10.0.0.1", 5), [], None, "10.0.0.1"),
        (("10.0.0.1", 5), [(b"x-forwarded-for", b"1.2.3.4")], None, "10.0.0.1"),
        (("10.0.0.1", 5), [(b"x-forwarded-for", b"6.6.6.6, 1.2.3.4")], "X-Forwarded-For", "1.2.3.4"),
        (("10.0.0.1", 5), [(b"x-forwarded-for", b"6.6.6.6")] * 2, "X-Forwarded-For", "6.6.6.6"),
        (("10.0.0.1", 5), [], "X-Forwarded-For", "10.0.0.1"),
        (("::ffff:1.2.3.4", 5), [], None, "1.2.3.4"),
        (("2001:db8:1:2:3::4", 5), [], None, "2001:db8:1:2::/64"),
        (("testclient", 5), [], None, "testclient"),
        (None, [], None, ""),
        (None, [(b"x-real-ip", b"\xff" * 5000)], "X-Real-IP", "ÿ" * 100),
    ],
)
def test_a_client_is_its_address(client, headers, header, expected):
    """The address of the connection, or of a trusted proxy's header; IPv6 addresses count by their network."""
    assert client_address({"client": client, "headers": headers}, header) == expected
