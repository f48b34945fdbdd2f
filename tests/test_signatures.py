"""Only what GitLab signed is believed, by vectors that others made; nothing makes it stumble."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from tests.deliveries import NAMES, NOW, PLAIN, TOKEN, Delivery, lower, recorded, signed
from tests.fuzz import TARGETS

A_TOKEN = b"whsec_dGVzdHRlc3R0ZXN0dGVzdHRlc3R0ZXN0dGVzdHRlc3Q="
A_BODY = b'{"object_kind":"push","ref":"refs/heads/main"}'
A_HEADERS = {
    "webhook-id": "f5e5f430-f57b-4e6e-9fac-d9128cd7232f",
    "webhook-timestamp": "1744578123",
    "webhook-signature": "v1,JJLPUQdHVZhy2g97l6D7t6vUjYNtwb+uAtztp44KhxE=",
}
A_TIME = 1744578123.0
PREFIX = "401 NotAuthentic: "
KEYS = [hook.decode_signing_token(TOKEN.encode(), 1)]


def refusal(mode: str, keys: list[bytes], headers: dict[str, str], body: bytes, now: float) -> str:
    """Why a delivery is refused; nothing when it is believed."""
    try:
        hook.verify_delivery(mode, keys, headers, body, now)
    except hook.DeliveryError as refused:
        return f"{int(refused.status)} {refused.code}: {refused}".removeprefix(PREFIX)
    return ""


def verify(headers: dict[str, str], body: bytes = A_BODY, **other: Any) -> str:
    """Why a signed delivery is refused; nothing when it is believed."""
    keys = other.get("keys", [hook.decode_signing_token(A_TOKEN, 1)])
    return refusal("signature", keys, headers, body, other.get("now", A_TIME))


# === Vectors that others made ===


def test_the_vector_of_the_standard_webhooks_libraries_verifies() -> None:
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert not verify(headers, b'{"test": 2432232314}', keys=[key], now=1614265330)


def test_the_vector_for_the_token_in_gitlab_s_own_documentation_verifies() -> None:
    assert not verify(A_HEADERS)


@pytest.mark.parametrize(
    "signature",
    [
        "v1,8IC9T+5VlgGurZ3FeeokU5/FVzSg9zQ9omZ5ZeK37Z0=",  # the whole token as the key
        "v1,pV2Y+fb6eQbGDV/DK2Hw3LCMAiTYEEjHBQnaKUIY/KI=",  # its base64 text as the key
    ],
)
def test_a_signature_with_the_text_of_the_token_as_key_does_not_verify(signature: str) -> None:
    assert verify(A_HEADERS | {"webhook-signature": signature}) == (
        "webhook-signature does not match"
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_recorded_delivery_verifies(name: str) -> None:
    delivery = recorded(name)
    assert not verify(lower(delivery.headers), delivery.body, keys=KEYS, now=NOW)


def test_our_signer_makes_what_gitlab_makes() -> None:
    *signed_parts, signature = (value.encode() for value in A_HEADERS.values())
    assert hook.sign(hook.decode_signing_token(A_TOKEN, 1), *signed_parts, A_BODY) == signature


# === What must not pass ===


def test_a_changed_body_is_refused() -> None:
    assert verify(A_HEADERS, A_BODY.replace(b"main", b"evil")) == "webhook-signature does not match"


@pytest.mark.parametrize("name", list(A_HEADERS))
def test_a_changed_header_is_refused(name: str) -> None:
    assert verify(A_HEADERS | {name: A_HEADERS[name][:-1] + "0"})


@pytest.mark.parametrize("name", list(A_HEADERS))
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_or_empty_header_is_refused_and_named(name: str, value: str | None) -> None:
    headers = {k: v for k, v in A_HEADERS.items() if k != name}
    headers |= {} if value is None else {name: value}
    assert name in verify(headers)


@pytest.mark.parametrize(
    "stamp",
    [
        "1_744_578_123", " 1744578123", "1744578123\n", "+1744578123", "-1744578123",
        "1744578123.0",
                "nan", "inf", "1e9", "\uff11\uff17\uff14\uff14",
        "0x67fc2b4b", "1" * 13, "now", "\u00b2",
    ],
)  # fmt: skip
def test_a_timestamp_that_only_python_takes_for_a_number_is_refused(stamp: str) -> None:
    signed_string = f"{A_HEADERS['webhook-id']}.{stamp}.".encode() + A_BODY
    digest = hmac.digest(hook.decode_signing_token(A_TOKEN, 1), signed_string, "sha256")
    headers = A_HEADERS | {
        "webhook-timestamp": stamp.encode().decode("latin-1"),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }
    assert verify(headers) == "webhook-timestamp is not a recent Unix time"


@pytest.mark.parametrize(
    ("offset", "fresh"), [(300, True), (-300, True), (300.5, False), (-301, False)]
)
def test_a_delivery_is_believed_for_five_minutes_around_its_time(
    offset: float, fresh: bool
) -> None:
    refusal = verify(A_HEADERS, now=A_TIME + offset)
    assert refusal == ("" if fresh else "webhook-timestamp is not a recent Unix time")


def test_a_wrong_signature_does_not_learn_whether_its_time_was_right() -> None:
    wrong = A_HEADERS | {"webhook-signature": "v1,AAAA"}
    assert verify(wrong, now=A_TIME + 9999) == verify(wrong)


@pytest.mark.parametrize(
    "header",
    [
        "v1", "v1,", ",", "v1,,", " ", "v2,{0}", "v1a,{0}", "V1,{0}", "{0}", "v1={0}", "v1,{0}=",
        "v1,%%%", "v1,\xff\xfe", "v1,{0}\x00", "v1,a, v1,b", "\x00" * 5000, "v1,ä",
    ],
)  # fmt: skip
def test_a_malformed_signature_header_is_a_refusal_and_no_crash(header: str) -> None:
    value = A_HEADERS["webhook-signature"].removeprefix("v1,")
    headers = A_HEADERS | {"webhook-signature": header.replace("{0}", value)}
    assert verify(headers) == "webhook-signature does not match"


def test_no_header_with_characters_beyond_ascii_makes_it_stumble() -> None:
    for name in A_HEADERS:
        assert verify(A_HEADERS | {name: "Schlüssel \xa0"})
        assert verify(A_HEADERS | {name: "鍵 \ud800"})


def test_an_empty_key_is_never_among_the_keys(tmp_path: Any) -> None:
    (tmp_path / "webhook-tokens").write_text("\n  \n\r\n", "utf-8")
    with pytest.raises(hook.ConfigError, match="missing or empty"):
        hook.Secrets(tmp_path).keys("token")


@pytest.mark.parametrize("mode", ["signature", "token", "hmac"])
def test_secrets_are_compared_in_constant_time_by_digests_of_one_length(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.extend((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    headers = A_HEADERS | {"x-gitlab-token": "short"}
    assert refusal(mode, [bytes(32), b"longer than the other"], headers, A_BODY, A_TIME)
    assert {len(value) for value in compared} == {32}
    assert len(compared) == 4


# === What must pass ===


def test_any_of_several_signatures_is_enough() -> None:
    value = A_HEADERS["webhook-signature"]
    for header in (f"v1,AAAA {value}", f"{value} v1,AAAA", f"v1a,x v2,y  {value}"):
        assert not verify(A_HEADERS | {"webhook-signature": header})


def test_so_many_signatures_that_comparing_would_be_work_are_not_compared() -> None:
    header = " ".join(["v1,AAAA"] * 1000 + [A_HEADERS["webhook-signature"]])
    assert verify(A_HEADERS | {"webhook-signature": header})


def test_any_of_several_tokens_verifies_so_that_they_rotate() -> None:
    old, new = hook.decode_signing_token(A_TOKEN, 1), bytes(32)
    assert not verify(A_HEADERS, keys=[new, old])
    assert not verify(A_HEADERS, keys=[old, new])
    assert verify(A_HEADERS, keys=[new])


def test_a_body_that_is_no_text_is_signed_like_any_other() -> None:
    delivery = signed(b"\xff\x00\xfe", token=A_TOKEN.decode(), at=A_TIME)
    assert not verify(delivery.headers, delivery.body)


# === Plain tokens, and the article's scheme ===


def plain(mode: str, keys: list[bytes], token: str | None, body: bytes = A_BODY) -> bool:
    headers = {} if token is None else {"x-gitlab-token": token}
    said = refusal(mode, keys, headers, body, NOW)
    assert said in ("", "x-gitlab-token does not match", "x-gitlab-token: required")
    return not said


def test_a_plain_token_must_be_the_very_same() -> None:
    keys = [b"old-secret", PLAIN.encode()]
    assert plain("token", keys, PLAIN)
    assert plain("token", keys, "old-secret")
    for wrong in (None, "", " ", PLAIN[:-1], PLAIN + "x", PLAIN.upper(), "ü" * 20, "\ud800"):
        assert not plain("token", keys, wrong)


def test_an_empty_token_is_wrong_even_where_an_empty_secret_slipped_in() -> None:
    assert not plain("token", [b""], "")
    assert not plain("token", [b""], None)


def test_a_token_beyond_ascii_is_compared_by_its_bytes() -> None:
    assert plain("token", ["schlüssel".encode()], "schlüssel".encode().decode("latin-1"))


def test_hmac_is_hex_over_the_body_with_the_token_as_key() -> None:
    # The vector of GitHub's documentation; the article sends the same digest in X-Gitlab-Token.
    key, body = b"It's a Secret to Everybody", b"Hello, World!"
    digest = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert plain("hmac", [key], digest, body)
    assert not plain("hmac", [key], digest, body + b" ")
    for wrong in (None, "", key.decode(), f"sha256={digest}", hashlib.sha256(body).hexdigest()):
        assert not plain("hmac", [key], wrong, body)


def test_no_mode_falls_back_to_a_weaker_one() -> None:
    delivery = recorded("gitlab-push-branch")
    headers = lower(delivery.headers)
    unsigned = {k: v for k, v in headers.items() if k != "webhook-signature"}
    assert unsigned["x-gitlab-token"] == PLAIN
    assert verify(unsigned, delivery.body, keys=[*KEYS, PLAIN.encode()], now=NOW)
    with pytest.raises(hook.DeliveryError):
        hook.verify_delivery("hmac", [PLAIN.encode()], headers, delivery.body, NOW)


# === Anything else ===


@settings(max_examples=150, deadline=None, database=None)
@given(TARGETS["signatures"].inputs)
def test_no_header_and_no_body_makes_the_check_do_anything_but_refuse(given_bytes: bytes) -> None:
    TARGETS["signatures"].run(given_bytes)


@settings(max_examples=50, deadline=None, database=None)
@given(st.binary(max_size=200), st.integers(0, 10**11), st.text("abc-0189._", min_size=1))
def test_what_is_signed_verifies_and_with_one_byte_more_it_does_not(
    body: bytes, stamp: int, name: str
) -> None:
    delivery = signed(body, at=stamp, name=name)
    assert not verify(delivery.headers, delivery.body, keys=KEYS, now=stamp)
    longer = Delivery(delivery.headers, body + b"\0")
    assert verify(longer.headers, longer.body, keys=KEYS, now=stamp)
