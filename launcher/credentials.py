"""What looks like a secret: whoever sees a cluster's dashboard can read its jobs' commands, configurations, variables.

Judged by names, by the shape of URLs and by what known services' tokens begin with; a secret that looks like any other
word is not found.
"""

from __future__ import annotations

import re

# Words of a name, as `_`, `-` and capitals divide it: KEYBOARD and TOKENIZERS_PARALLELISM hold none of them.
_WORDS = frozenset({
    "key", "keys", "token", "tokens", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "pat",
    "auth", "authorization", "bearer", "jwt", "cookie", "cookies", "credential", "credentials", "cred", "creds",
    "signature", "sig", "sas",
})  # fmt: skip
_LAST = frozenset({"pass", "pwd"})  # DB_PASS, but not PASS_RATE; and PWD is the folder
_RUN_TOGETHER = (  # PGPASSWORD
    "password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "secretkey", "privatekey",
    "credential", "credentials", "signature",
)  # fmt: skip
# With one of these in it a name is a setting about secrets, or about a model's tokens: MAX_TOKENS, RAY_AUTH_MODE.
_SETTING = frozenset({"max", "min", "num", "count", "limit", "size", "mode", "cache", "disable", "enable", "use"})
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf_|ghp_|github_pat_|AKIA|sk-|xoxb-)[A-Za-z0-9_-]*?[A-Za-z0-9]{16}")
_USER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s@]*@")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?!\[)[^/?#\s@:]+:(?!\d*(?:\W|$))")  # with a `/` in it; no port
_PARAMETER = re.compile(r"[?&;#]([A-Za-z0-9_.-]+)=(?=[^&;#\s])")


def is_secret_name(name: str) -> bool:
    """Whether a variable or parameter of this name holds a secret, going by its words."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or not _SETTING.isdisjoint(words):
        return False
    return (
        not _WORDS.isdisjoint(words)
        or (len(words) > 1 and words[-1] in _LAST)
        or any(word.endswith(_RUN_TOGETHER) for word in words)
    )


def secret_in(text: str) -> str | None:
    """What a text holds that is secret, in words that do not repeat it: a token, a URL's user, a signature; or None."""
    if _USER.search(text) or _PASSWORD.search(text):
        return "a URL with a user name or password"
    if token := _TOKEN.search(text):
        return f"a token ({token[1]}...)"
    names = [name for name in _PARAMETER.findall(text) if is_secret_name(name)]
    return f"a URL with the parameter {names[0]}" if names else None


def hidden(text: str) -> str:
    """The text without its URLs' users and passwords."""
    return re.sub(r"(?<=://)[^/?#\s@]*@", "", text)
