"""Kubernetes quantities (`500m`, `64Mi`): arithmetic and the canonical spelling."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import lru_cache

_PATTERN = re.compile(
    r"^([+-]?(?:\d+\.?\d*|\.\d+))(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?\d+)?$"
)
_BINARY = {"Ei": 2**60, "Pi": 2**50, "Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
_DECIMAL = {"E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "": 0, "m": -3, "u": -6, "n": -9}


@lru_cache(maxsize=4096)
def parse(text: str) -> Fraction:
    """The number that a quantity means; ValueError when it is none."""
    found = _PATTERN.match(text.strip())
    if not found:
        raise ValueError(f"not a quantity: {text!r}")
    number, suffix = Fraction(Decimal(found[1])), found[2] or ""
    if suffix in _BINARY:
        return number * _BINARY[suffix]
    power = _DECIMAL.get(suffix)
    if power is None:
        power = int(suffix[1:])
    return number * Fraction(10) ** power


def show(value: Fraction, *, binary: bool) -> str:
    """The shortest spelling without a fraction, in powers of 1024 or of 1000."""
    if binary and value.denominator == 1:
        whole = value.numerator
        for suffix, factor in _BINARY.items():
            if whole and whole % factor == 0:
                return f"{whole // factor}{suffix}"
        return str(whole)
    for suffix, power in _DECIMAL.items():
        scaled = value / Fraction(10) ** power
        if scaled.denominator == 1 and (scaled or not power):
            return f"{scaled.numerator}{suffix}"
    nano = Decimal(value.numerator * 10**9) / Decimal(value.denominator)
    return f"{nano.to_integral_value(ROUND_CEILING)}n"


def is_binary(text: str) -> bool:
    """Whether the quantity is spelled in powers of 1024."""
    return text.strip().endswith("i")


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The spelling that the API server gives back; ValueError when it is no quantity."""
    return show(parse(text), binary=is_binary(text))


def add(left: str, right: str) -> str:
    """The sum, spelled as the left one is unless that is zero."""
    binary = is_binary(right) if parse(left) == 0 else is_binary(left)
    return show(parse(left) + parse(right), binary=binary)
