"""Names are judged by their words, URLs by what stands before their host and behind their question mark."""

from __future__ import annotations

import pytest

from launcher.credentials import hidden, is_secret_name, secret_in


@pytest.mark.parametrize(
    "name",
    ["GITHUB_PAT", "PGPASSWORD", "AUTH_HEADER", "WANDB_API_KEY", "MY_SECRET", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "apikey",
     "DB_PASS", "DB_PWD", "X-Amz-Signature", "X-Amz-Security-Token", "AWSAccessKeyId", "sig", "access_key", "authToken",
     "GOOGLE_APPLICATION_CREDENTIALS", "USER_PASSWORD", "PASSWORD_MINIMAL"],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["KEYBOARD", "TOKENIZERS_PARALLELISM", "MONKEY", "PWD", "OLDPWD", "PATH", "PATIENCE", "AUTHOR", "PASS_RATE",
     "COMPASS", "NCCL_DEBUG", "OMP_NUM_THREADS", "SECRETARY", "", "_1", "DESIGN", "MAX_TOKENS",
     "RAY_AUTH_MODE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "CUDA_KEY_CACHE"],
)  # fmt: skip
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    ["https://joe:pw@host/x", "https://ghp_x@host/x", "simplecache::s3://ID:a/b+c@bucket/x", "pipe:curl ftp://a:b@c",
     "https://host/x?X-Amz-Expires=1&X-Amz-Signature=1f", "https://host/x?sv=1&sig=a%2f", "https://host/x?token=a",
     "https://host/x#access_token=a", "--set=data.url=https://host?Signature=x", f"hf_{'aB3' * 11}",
     f"ghp_{'aB3' * 12}", f"github_pat_11ABC_{'aB3' * 12}", f"AKIA{'AB3' * 5}A", f"sk-proj-a_b-{'aB3' * 9}",
     f"run --with=sk-{'aB3' * 9}", f"xoxb-1234567890-{'aB3' * 8}"],
)  # fmt: skip
def test_secrets_in_texts(text: str) -> None:
    assert secret_in(text)


@pytest.mark.parametrize(
    "text",
    ["https://host:8080/a@b/x", "http://[::1]:80/x", "s3://bucket/{000..127}.tar", "hf://datasets/a/b@main/x.tar",
     "joe@host", "/a/b?c=d", "https://host/x?version=2", "https://host/x?token=", "a=b?c", "memory://x", "http://h:80",
     '"http://a:80","http://b:81"', "gs://b/x:y", "/data/sk-learn/experiments", "hf_datasets_of_mine", "hf_transfer",
     "/task-force-internationalisations", "AKIA", "runs/hf_foundation"],
)  # fmt: skip
def test_other_texts(text: str) -> None:
    assert secret_in(text) is None


def test_what_is_found_is_not_repeated() -> None:
    assert secret_in("https://host/x?a=1&sig=hush") == "a URL with the parameter sig"
    assert secret_in(f"a ghp_{'hush' * 9}") == "a token (ghp_...)"
    assert hidden("no https://joe:hush@host/x, https://host/a@b") == "no https://host/x, https://host/a@b"
