# SPDX-License-Identifier: Apache-2.0
"""The two ways things go wrong: a request that cannot be carried out, and a run that failed."""


class MoEPruneError(Exception):
    """Anything this package refuses or fails at, with a message for the person who asked."""


class RequestError(MoEPruneError, ValueError):
    """The request is wrong: what was asked, what is true, what to change. Nothing was changed or written."""


class RunError(MoEPruneError, RuntimeError):
    """The request was fine, and carrying it out found something that only the run could find."""


def nearest_first(name: str, known: list[str]) -> str:
    """The known names as one string, the one most like ``name`` first."""
    import difflib

    ratio = {candidate: difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio() for candidate in known}
    return ", ".join(sorted(known, key=lambda candidate: (-ratio[candidate], candidate)))
