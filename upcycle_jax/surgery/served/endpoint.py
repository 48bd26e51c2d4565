"""Log-probabilities of a prompt, asked of an OpenAI-style completions endpoint (vLLM, SGLang,
llama.cpp's server).
"""

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.printing import printable

_MAX_BYTES = 64 << 20
_TIMEOUT = 600.0


class Endpoint:
    """A server.

    Args:
      url: 'http://host:port', with '/v1' or without.
      model: as the server names it; None: the first that it lists.

    Raises:
      ValueError: no http URL, or the server does not answer as it should.
    """

    def __init__(self, url: str, model: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--endpoint {url!r} is no URL: give http://host:port")
        self._url = url.rstrip("/").removesuffix("/v1")
        self.model = model if model is not None else self._first_model()

    def prompt_logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Float64 `[L - 1]`: the log-probability of each token of a prompt but the first, given
        those before it.

        Args:
          tokens: int `[L]`.

        Raises:
          ValueError: the server cannot be reached, refuses, or answers otherwise.
        """
        answer = self._ask(
            "completions",
            {
                "model": self.model,
                "prompt": [int(token) for token in tokens],
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
            },
        )
        try:
            found = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(tokens)]
            out = np.array([float(one) for one in found])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(
                f"{self._url} does not echo log-probabilities of a prompt: its server needs to"
                " support echo and logprobs of completions"
            ) from None
        if len(out) != len(tokens) - 1 or not np.isfinite(out).all():
            raise ValueError(
                f"{self._url} gives {len(out)} finite log-probabilities for a prompt of"
                f" {len(tokens)} tokens: it split the prompt otherwise, or does not echo it"
            )
        return out

    def _first_model(self) -> str:
        try:
            return str(self._ask("models", None)["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self._url} lists no model: name it with --endpoint_model") from None

    def _ask(self, what: str, content: dict[str, Any] | None) -> Any:
        url = f"{self._url}/v1/{what}"
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                body = answer.read(_MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = printable(error.read(400).decode(errors="replace"))
            raise ValueError(f"{url} answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{url} cannot be reached: {error}") from None
        if len(body) > _MAX_BYTES:
            raise ValueError(f"{url} answers with more than {_MAX_BYTES} bytes")
        return untrusted.parse_json(body, url)
