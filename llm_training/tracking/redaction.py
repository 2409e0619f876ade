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
_URL = re.compile(r"\w+://\S+")
# `?password=abc`, `&X-Amz-Signature=abc`: of databases, and of links that are signed.
_URL_SECRET = re.compile(
    r"([?&;][\w-]*(?:passw(?:or)?d|pwd|secret|token|credential|key|signature|sig)=)[^\s&;#\"']+",
    re.I,
)
# `--hf_token abc`, `password=abc`, `"api_key": "abc"`, `'token': 'abc'`, `Bearer abc`
_NAMED_IN_TEXT = re.compile(
    r"""(--[\w-]*(?:token|passw(?:or)?d|secret|(?:api|access|private)[_-]?key)[ =]"""
    r"""|\w*(?:passw(?:or)?d|secret|(?:api|access|private)_?key|_token)["']?[=:]\s?"""
    r"""|["']token["']:\s?|\b(?:bearer|authorization: basic)\s)"""
    r"""(["']?)(?!\[redacted)[^\s"',;&)]+""",
    re.I,
)
# As Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack and Databricks make them.
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{15,}"
    r"|A(KI|SI)A[0-9A-Z]{16}|sk-[\w-]{20,}|xox[abp]-[\w-]{10,}|dapi[0-9a-f]{32})\b"
)


def redact(value: Any, name: str = "") -> Any:
    """A copy of `value` (of the setting `name`) without secrets, however deep they lie.

    Secret are the values of names such as `hf_token`, `api_key` and `db_password`, the login in a
    URL such as `https://user:pass@host`, and tokens as the known services make them.
    `tokenizer_name` and `eos_token` are not.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if value is not None and _SECRET_NAME.search(name) and not _PLAIN_TOKEN_NAME.search(name):
        return REDACTED
    return _redact_tokens(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """A text such as a traceback without logins, tokens, and what is said to be a secret."""

    def hide(match: re.Match[str]) -> str:
        name = match[1].strip("\"'=: -")
        return match[0] if _PLAIN_TOKEN_NAME.search(name) else match[1] + match[2] + REDACTED

    return _NAMED_IN_TEXT.sub(hide, _redact_tokens(text))


def _redact_tokens(text: str) -> str:
    return _TOKEN.sub(REDACTED, redact_url(text))


def redact_url(text: str) -> str:
    """The text with the logins in its URLs taken out, also from behind their question marks."""

    def hide(match: re.Match[str]) -> str:
        return _URL_SECRET.sub(rf"\g<1>{REDACTED}", match[0])

    return _URL.sub(hide, _URL_LOGIN.sub(rf"\g<1>{REDACTED}@", text))
