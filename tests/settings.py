"""The settings of the configuration, as the README lists them."""

from __future__ import annotations

import typing
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import gitops_hook as hook


@cache
def loaded(document: str) -> hook.Config:
    """Return the configuration in a text; the same text is read once, which takes milliseconds."""
    return hook.load_config(document)


def settings_by_path(section: Any = hook.Config, prefix: str = "") -> dict[str, hook.Setting]:
    """Return every setting by the path by which faults and the README name it."""
    settings: dict[str, hook.Setting] = {}
    for key, declared in hook.settings_of(section).items():
        inner = (*typing.get_args(declared.kind), declared.kind)[0]
        if is_dataclass(inner):
            dot = "." if inner is declared.kind else "[]."
            settings |= settings_by_path(inner, f"{prefix}{key}{dot}")
        else:
            settings[prefix + key] = declared
    return settings
