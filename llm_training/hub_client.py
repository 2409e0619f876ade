"""The Hugging Face hub as this project talks to it: who one is, where one may write, and no longer
than a bounded time.

Who one is, HF_TOKEN or `hf auth login` says, and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llm_training.tracking.redaction import redact_text, redact_url

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

START_SECONDS = 20.0  # without a byte from the hub, before training
PAUSES = (1.0, 5.0)  # in seconds, before the hub is asked again
LOGIN = (
    "set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens), or give"
    " such a one to hf auth login"
)


class HubError(RuntimeError):
    """The hub cannot take a model as asked; the message says what to do."""


@dataclass(frozen=True)
class Repository:
    """Where a model is published.

    Attributes:
        id: OWNER/NAME.
        is_there: whether the hub has it already.
    """

    id: str
    url: str
    is_private: bool
    is_there: bool

    def __str__(self) -> str:
        return f"{self.url} ({'private' if self.is_private else 'public'})"


def open_repository(wished: str, *, private: bool, create: bool = True) -> Repository:
    """Tries the login, and finds or makes the repository, into which this login may write.

    Args:
        wished: OWNER/NAME, or NAME of the login's user.
        private: whether a new one is.
        create: whether one that is missing is made.

    Raises:
        HubError: as the message says.
    """
    with bounded_client(START_SECONDS) as api:
        if api.token is None:
            raise HubError(f"The hub wants to know who publishes {wished}: {LOGIN}.")
        try:
            return patiently(lambda: _find_or_make(api, wished, private=private, create=create))
        except HubError:
            raise
        except Exception as error:
            raise HubError(
                f"The hub at {redact_url(api.endpoint)} cannot be asked for {wished}:"
                f" {reason_of(error)}. See to the network and HF_ENDPOINT, or leave push_to_hub out"
                " and upload later: python -m llm_training.hub push RUN_FOLDER"
            ) from error


def _find_or_make(api: HfApi, wished: str, *, private: bool, create: bool) -> Repository:
    from huggingface_hub.errors import RepositoryNotFoundError

    me = _login(api)
    user = str(me["name"])
    repository = wished if "/" in wished else f"{user}/{wished}"
    is_there = True
    try:
        with _forbidden(f"hub_model_id={repository} exists, and {user} may not write to it"):
            api.auth_check(repository, write=True)
    except RepositoryNotFoundError:
        is_there = False
        if create:
            owner = repository.partition("/")[0]
            with _forbidden(f"{user} may not make hub_model_id={repository} below {owner}"):
                api.create_repo(repository, private=private, exist_ok=True)
    place = redact_url(api.endpoint)
    if not is_there and not create:
        return Repository(repository, f"{place}/{repository}", private, is_there)
    # Asked for even where it is new: an organization may have rules of its own.
    info = api.model_info(repository)
    return Repository(info.id, f"{place}/{info.id}", bool(info.private), is_there)


def _login(api: HfApi) -> dict[str, Any]:
    """Who the token says one is, where it is one that may write."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        me = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise HubError(
            "The hub does not know the token that it was given (that in HF_TOKEN comes before that"
            f" of hf auth login): {LOGIN}."
        ) from None
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The token of {me['name']} may read on the hub but not write: {LOGIN}.")
    return me


@contextmanager
def _forbidden(problem: str) -> Iterator[None]:
    """Says what it means when the hub forbids something."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise HubError(
            f"{problem}: give another --hub_model_id, such as NAME alone for one below your own"
            " user, or a token that may write there."
        ) from None


# ------------------------------------------------------------------------------------- the client


@contextmanager
def bounded_client(seconds: float) -> Iterator[HfApi]:
    """The hub's client with requests that end: by itself it waits for an answer without limit.

    What it logs of its own tries is left out: it holds signed
    addresses, which are as good as a login.

    Args:
        seconds: without a byte, after which a request has failed.
    """
    from huggingface_hub import HfApi, get_token, set_client_factory
    from huggingface_hub.utils import _http

    build_client = _http._GLOBAL_CLIENT_FACTORY

    def build_bounded() -> Any:
        client = build_client()
        client.timeout = seconds
        return client

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    set_client_factory(build_bounded)
    logger.setLevel(logging.ERROR)
    try:
        endpoint = (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None
        with _bars_on_a_terminal():
            yield HfApi(endpoint=endpoint, token=get_token())
    finally:
        logger.setLevel(level)
        set_client_factory(build_client)


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Shows the client's bars there, whatever other packages have set, and nowhere else."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # a person has decided
        yield
        return
    were_off = are_progress_bars_disabled()
    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if were_off else enable_progress_bars)()


def patiently(work: Callable[[], T]) -> T:
    """Does it, and again after each of PAUSES where what failed may pass by itself."""
    for pause in PAUSES:
        try:
            return work()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return work()


def may_pass(error: BaseException) -> bool:
    """Whether it comes from the network, or from a hub that is busy or broken for the moment."""
    from huggingface_hub.errors import HTTPError

    cause = root_of(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(cause, HTTPError)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line without tokens and signed addresses."""
    cause = root_of(error)
    response = getattr(cause, "response", None)
    if response is not None:
        told = getattr(cause, "server_message", None) or response.reason_phrase
        text = f"it answers {response.status_code}: {told}"
    else:
        text = f"{type(cause).__name__}: {cause}"
    around = "" if cause is error else f"{error} "
    return redact_text(" ".join(f"{around}{text}".split()))[:400].rstrip(".")


def root_of(error: BaseException) -> BaseException:
    """The error of a request from which another was raised: the client wraps those of files.

    Where there is none, the first cause of all.
    """
    from huggingface_hub.errors import HTTPError

    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error
