"""The bearer token that a server asks for and a client sends, out of a file or the environment. No torch."""

import os
from pathlib import Path

from megatron_polar import log
from megatron_polar.errors import UserError

TOKEN_VARIABLE = "MEGATRON_POLAR_API_KEY"


def read_token(file: Path | str | None, *, variable: str) -> str | None:
    """The content of `file`, or without one that of the environment variable; its value appears in no message.

    None where neither is given. A variable that is set and empty gives None, too, with a warning. Raises UserError for
    a token that cannot be read or sent.
    """
    if file is not None:
        try:
            token, source = Path(file).read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"{file}: the file with the API key cannot be read ({reason}); check the path") from None
    elif variable in os.environ:
        token, source = os.environ[variable].strip(), f"the environment variable {variable}"
        if not token:
            log.warn(f"{source} is empty, as if it were not set: there is no API key")
            return None
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{source}: not an API key; it must be one word of printable ASCII (openssl rand -hex 32 makes one)"
        )
    return token
