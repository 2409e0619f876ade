"""Keeps secrets out of what a run writes down about itself."""

from __future__ import annotations

import re
from typing import Any

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(r"secret|passw(or)?d|credential|(api|private|access)_?key|token$", re.I)
# Names that end in "token" and are a tokenizer's or a metric's: pad_token, flops_per_token.
_PLAIN_TOKEN_NAME = re.compile(
    r"(^|_)(pad|eos|bos|unk|sep|cls|mask|per|image|audio|video|start|end|decoder)_token$", re.I
)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s]+@")


def redact(value: Any, name: str = "") -> Any:
    """A copy of `value` (of the setting `name`) without secrets, however deep they lie.

    Secret are the values of names such as `hf_token`, `api_key` and `db_password`, and the login in
    a URL such as `https://user:pass@host`. `tokenizer_name` and `eos_token` are not.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if value is not None and _SECRET_NAME.search(name) and not _PLAIN_TOKEN_NAME.search(name):
        return REDACTED
    return redact_url(value) if isinstance(value, str) else value


def redact_url(text: str) -> str:
    """The text with the logins in its URLs taken out."""
    return _URL_LOGIN.sub(rf"\g<1>{REDACTED}@", text)
