"""Whether and when a server that turned a request away is to be asked again; for all clients of HTTP servers."""

import email.utils
import time
from collections.abc import Mapping

_PASSING = (408, 425, 429)
_LASTING = (501, 505)
"""Of those from 500 on: what is not implemented will not be the next time."""


def may_pass(status: int) -> bool:
    """Whether an HTTP status says that a server, or a proxy before it, cannot answer just now."""
    return status in _PASSING or (status >= 500 and status not in _LASTING)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone: a number or a date. None where it names no time to wait: nothing at
    all, 0, what cannot be read, a date that is past by our clock. Then the pause is the caller's."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0.0 else None
