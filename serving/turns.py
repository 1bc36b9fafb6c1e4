"""A lock given in the order in which it was asked for: who asks again and again shuts nobody out."""

import threading


class Turns:
    """Used with `with`; not reentrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._given = self._served = 0  # tickets

    def __enter__(self) -> None:
        with self._condition:
            ticket = self._given
            self._given += 1
            self._condition.wait_for(lambda: self._served == ticket)

    def __exit__(self, *_) -> None:
        with self._condition:
            self._served += 1
            self._condition.notify_all()
