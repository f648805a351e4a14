"""Checks of arguments, for every room above."""

from __future__ import annotations

from typing import Any


def check_bool(name: str, value: Any) -> bool:
    """Returns `value`, or raises `TypeError` where it is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}.")
    return value


def check_integer(name: str, value: Any) -> None:
    """Raises `TypeError` where an argument is no integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises where an argument is no positive integer."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
