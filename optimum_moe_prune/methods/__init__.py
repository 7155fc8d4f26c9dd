# SPDX-License-Identifier: Apache-2.0
"""The methods: one file each, named as the method. Importing this package makes them known."""

from . import (
    aimer,
    auto,
    ean,
    enumeration,
    fisher,
    frequency,
    importance,
    man,
    mosaic,
    msan,
    pathfinder,
    random,
    reap,
    soft_frequency,
    transition,
    variability,
)
from .registry import Method, every_method, get_method, list_methods, make_options, register_method

__all__ = [
    "Method",
    "aimer",
    "auto",
    "ean",
    "enumeration",
    "every_method",
    "fisher",
    "frequency",
    "get_method",
    "importance",
    "list_methods",
    "make_options",
    "man",
    "mosaic",
    "msan",
    "pathfinder",
    "random",
    "reap",
    "register_method",
    "soft_frequency",
    "transition",
    "variability",
]
