"""The store, which runs beside these tests."""

import os

import store


def add(name: str, number: int) -> int:
    return store.add("localhost", int(os.environ.get("STORE_PORT", store.PORT)), name, number)


def test_what_is_added_is_there_afterwards():
    before = add("tea", 0)
    assert add("tea", 2) == before + 2
    assert add("tea", 3) == before + 5


def test_each_name_has_a_number_of_its_own():
    before = add("cake", 0)
    add("tea", 1)
    assert add("cake", 0) == before
