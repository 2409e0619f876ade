"""Proves that secrets are kept out of what a run writes down, and nothing else is."""

from __future__ import annotations

import pytest

from arguments import Arguments
from llm_training.tracking import redact
from llm_training.tracking.redaction import redact_text


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "accessToken", "api_key", "apikey", "db_password", "SECRET"],
)
def test_names_of_secrets(name: str) -> None:
    assert redact({name: "abc"}) == {name: "[redacted]"}


@pytest.mark.parametrize(
    "name",
    ["tokenizer_name", "cache_dir", "sample_max_new_tokens", "eos_token", "flops_per_token"],
)
def test_names_of_what_is_no_secret(name: str) -> None:
    assert redact({name: "token_cache"}) == {name: "token_cache"}


def test_a_secret_that_is_not_set_shows_that() -> None:
    assert redact({"hf_token": None}) == {"hf_token": None}


def test_none_of_our_arguments_is_taken_for_a_secret() -> None:
    values = dict.fromkeys(vars(Arguments()), "value")
    assert redact(values) == values


def test_redacting_keeps_what_an_at_sign_is_not_a_login_in() -> None:
    for text in ("me@host.org", "https://host/a@b", "https://host/?q=a@b", "git@host:a/b"):
        assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "train.py --hf_token SECRET --seed 1",
        "--token=SECRET",
        '{"api_key": "SECRET"}',
        "password=SECRET&user=me",
        "Authorization: Bearer SECRET",
        "https://me:SECRET@host/x",
        "https://SECRET@github.com/a/b",
        "--api-key SECRET",
        "--password SECRET",
        "{'token': 'SECRET'}",
        "Authorization: Basic SECRET",
        "https://host/rows.jsonl?v=1&token=SECRET",
    ],
)
def test_secrets_in_a_text_are_taken_out(text: str) -> None:
    assert "SECRET" not in redact_text(text)
    assert "[redacted]" in redact_text(text)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@host/runs?user=me&password=SECRET",
        "https://host/rows.jsonl?access_token=SECRET#top",
        "https://host/rows.jsonl?X-Amz-Date=1&X-Amz-Signature=SECRET",
        "https://host/rows.jsonl?sv=1&sig=SECRET",
    ],
)
def test_secrets_behind_the_question_mark_of_a_url_are_taken_out(url: str) -> None:
    """In values too, which are settings such as `tracking_uri` and `train_file`."""
    assert redact(url) == url.replace("SECRET", "[redacted]").replace("me@", "[redacted]@")
    assert redact(redact(url)) == redact(url)


@pytest.mark.parametrize("token", ["hf_" + "a" * 34, "ghp_" + "b" * 36, "AKIA" + "C" * 16])
def test_tokens_of_known_services_are_taken_out_of_values(token: str) -> None:
    assert redact({"sample_prompt": [f"use {token} here"]}) == {
        "sample_prompt": ["use [redacted] here"]
    }


@pytest.mark.parametrize(
    "text",
    [
        "--pad_token=x",
        "eos_token='</s>'",
        "flops_per_token=4",
        "max_new_tokens=4",
        "per token: 3",
        "Who? token=a",
    ],
)
def test_texts_without_secrets_stay_as_they_are(text: str) -> None:
    assert redact_text(text) == text
