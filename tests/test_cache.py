"""The cache of encoded prompts and references."""

import threading

from realcustom.cache import Cache


def test_the_values_asked_for_last_stay():
    cache, made = Cache(max_bytes=2, size_of=lambda value: 1), []
    get = lambda key: cache.get(key, lambda: made.append(key) or key)
    for key in "abacab":
        assert get(key) == key
    assert made == ["a", "b", "c", "b"]  # "c" took the place of "b", which had been asked for before "a"
    assert (cache.hits, cache.misses, cache.num_bytes) == (2, 4, 2)
    cache.clear()
    get("a")
    assert made[-1] == "a" and cache.num_bytes == 1


def test_a_value_larger_than_the_cache_stays_alone():
    cache = Cache(max_bytes=5, size_of=len)
    assert [cache.get(text, lambda text=text: text) for text in ("abc", "a long one", "a long one")][-1] == "a long one"
    assert (cache.hits, cache.num_bytes) == (1, 10)
    cache.get("de", lambda: "de")
    assert cache.num_bytes == 2


def test_two_threads_make_a_value_once_and_a_failure_is_not_kept():
    cache, made = Cache(max_bytes=10, size_of=lambda value: 1), []
    begun, go_on = threading.Event(), threading.Event()

    def make():
        made.append(1)
        begun.set()
        go_on.wait(10)
        return "value"

    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.get("key", make))) for _ in range(2)]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == ["value", "value"] and len(made) == 1
    for failing in (lambda: 1 / 0, lambda: "better"):
        try:
            cache.get("other", failing)
        except ZeroDivisionError:
            continue
    assert cache.get("other", lambda: "too late") == "better"
