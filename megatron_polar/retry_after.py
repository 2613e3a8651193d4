"""When a server that turned a request away wants to be asked again; for all clients of HTTP servers."""

import email.utils
import time
from collections.abc import Mapping


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
