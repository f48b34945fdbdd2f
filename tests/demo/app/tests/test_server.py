"""What the shop promises."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest
import server


@pytest.fixture
def shop() -> Iterator[server.Shop]:
    running = server.Shop("127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def get(shop: server.Shop, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*shop.server_address[:2], timeout=5)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_front_page_greets_and_names_its_version(shop, monkeypatch):
    monkeypatch.setenv("GREETING", "Good morning")
    status, text = get(shop, "/")
    assert status == 200
    assert text.startswith(f"version {server.VERSION}: Good morning")


def test_a_shop_that_has_just_opened_is_well(shop):
    assert get(shop, "/ready") == (200, "well\n")


def test_a_shop_that_leaves_says_so_in_its_answers(shop):
    connection = http.client.HTTPConnection(*shop.server_address[:2], timeout=5)
    connection.request("GET", "/")
    first = connection.getresponse()
    first.read()
    shop.leaving.set()
    connection.request("GET", "/")
    second = connection.getresponse()
    second.read()
    assert (first.getheader("Connection"), second.getheader("Connection")) == (None, "close")
    connection.close()


@pytest.mark.parametrize(("net", "gross"), [(100, 119), (500, 595), (1, 1), (50, 60)])
def test_tax_is_added_and_rounded_to_the_nearest_cent(net, gross):
    assert server.price_with_tax(net) == gross
