"""The check of what is served, as the command `verify` runs it."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.checkpoints.huggingface.base import leaves_of
from upcycle_jax.checkpoints.huggingface.decoder import choosing
from upcycle_jax.checkpoints.huggingface.decoder.choosing import Form
from upcycle_jax.checkpoints.huggingface.decoder.reading_back import differences
from upcycle_jax.checkpoints.huggingface.decoder.writing import stated_model
from upcycle_jax.checkpoints.huggingface.files import CONFIG, load_json
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.printing import show
from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.served import theirs as transformers_side
from upcycle_jax.surgery.served.comparison import Comparison, compare
from upcycle_jax.surgery.served.endpoint import Endpoint
from upcycle_jax.surgery.served.ours import OurModel
from upcycle_jax.surgery.served.tensors import wrong_tensors
from upcycle_jax.text import shorten

Report = Callable[[str], object]

ROWS, LENGTH, MAX_RANDOM_LENGTH = 2, 64, 1024
MEAN_LOGPROB_TOLERANCE = 0.05
"""Engines compute in bfloat16, whose logits are off by a few hundredths; a wrong model is off by
tenths.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedCheck:
    """What is compared with what.

    Attributes:
      path: the checkpoint that was written.
      folder: the folder that is served; None: none is looked at.
      endpoint: URL of a server of it; None: none is asked.
      endpoint_model: what the server calls it; None: the first that it lists.
      model: the checkpoint's model; None: as it states.
      tokens: a JSON file of token ids, one list or several of one length; None: random ones.
      length: of random ones; None: `LENGTH`, or more where a window would not be felt.
    """

    path: str
    folder: Path | None = None
    endpoint: str | None = None
    endpoint_model: str | None = None
    model: ModelConfig | None = None
    tokens: Path | None = None
    length: int | None = None

    def run(self, *, report: Report = show) -> bool:
        """Compares, and returns whether all is as it should be.

        Args:
          report: called with every line of output.

        Raises:
          FileNotFoundError: the checkpoint or the folder is not there.
          ValueError: the checkpoint holds no language model, the tokens are none of it, the folder
            is none of a language model, transformers is not installed, or the endpoint does not
            answer.
        """
        reader = open_checkpoint(self.path)
        config = stated_model(reader, self.model)
        tokens = self._tokens(config)
        ok = True
        if self.folder is not None:
            ok &= _Folder(self.folder, reader, config).check(tokens, report)
        if self.endpoint is not None:
            server = Endpoint(self.endpoint, self.endpoint_model)
            ok &= _check_endpoint(server, OurModel(reader, config, tokens), tokens, report)
        report("served: what is served is this model" if ok else "served: it is ANOTHER model")
        return ok

    def _tokens(self, config: DecoderConfig) -> np.ndarray:
        if self.tokens is not None:
            return _tokens_of(self.tokens, config.vocab_size)
        window = config.sliding_window or 0
        felt = window + 16 if window + 16 <= MAX_RANDOM_LENGTH else 0
        length = self.length or max(LENGTH, felt)
        rng = np.random.default_rng(0)
        return rng.integers(0, config.vocab_size, (ROWS, length)).astype(np.int32)


def _tokens_of(path: Path, vocab_size: int) -> np.ndarray:
    try:
        content: Any = json.loads(path.read_bytes())
        rows = content if content and isinstance(content[0], list) else [content]
        found = np.array(rows)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON list of token ids, or of lists: {error}") from None
    if found.ndim != 2 or found.shape[1] < 2 or found.dtype.kind != "i":
        raise ValueError(
            f"{path} holds no token ids: one list of at least two whole numbers, or several of one"
            " length"
        )
    if not ((found >= 0) & (found < vocab_size)).all():
        raise ValueError(f"{path} holds ids outside of 0 to {vocab_size - 1}, the model's")
    return found.astype(np.int32)


class _Folder:
    """A folder, and the form of the model that it should be."""

    def __init__(self, folder: Path, reader: CheckpointReader, config: DecoderConfig):
        self._path, self._reader, self._config = folder, reader, config

    def check(self, tokens: np.ndarray, report: Report) -> bool:
        """Compares config.json, tensors, and what transformers computes."""
        try:
            served = open_checkpoint(self._path)
        except ValueError as error:
            report(f"served: {error}")
            return False
        stated = served.model_config()
        if not isinstance(stated, DecoderConfig):
            raise ValueError(
                f"{self._path} is no Hugging Face folder of a decoder-only language model"
            )
        model_type = str(load_json(self._path, CONFIG).get("model_type"))
        form = self._form(model_type, stated)
        if form is None:
            report(f"served: this model cannot be a {model_type}, which the folder says it is")
            return False
        ok = self._say(list(differences(form.config, stated)), f"{CONFIG}:", report)
        if ok:
            report(f"served: {CONFIG} states this model, as {_named(form)}")
        leaves = form.leaves(
            {path.removeprefix(TARGET): leaf for path, leaf in leaves_of(self._reader).items()}
        )
        shapes = {path: leaf.spec.shape for path, leaf in leaves.items()}
        there = {path.removeprefix(TARGET): spec.shape for path, spec in served.specs().items()}
        if shapes == there:
            wrong = list(wrong_tensors(leaves, served, model_type, form.config))
            if self._say(wrong, "", report):
                report(f"served: the tensors of {len(leaves)} leaves hold the checkpoint's values")
            ok &= not wrong
        else:
            odd = sorted(
                path for path in shapes.keys() | there.keys() if shapes.get(path) != there.get(path)
            )
            ok = self._say([f"{path} has another shape" for path in odd], "", report) and ok
        return self._transformers(tokens, stated, report) and ok

    def _say(self, lines: list[str], what: str, report: Report) -> bool:
        for line in shorten(lines, 8):
            report(f"served: {what} {line}".replace("  ", " "))
        return not lines

    def _form(self, model_type: str, stated: DecoderConfig) -> Form | None:
        """The form of that type that is nearest to what the folder states."""
        if model_type not in choosing.HOLDERS:
            return None
        return min(
            choosing.forms(self._config, model_type),
            key=lambda form: len(list(differences(form.config, stated))),
            default=None,
        )

    def _transformers(self, tokens: np.ndarray, stated: DecoderConfig, report: Report) -> bool:
        experts = stated.moe.num_experts if stated.moe is not None else None
        try:
            seen = transformers_side.run(self._path, tokens, experts)
        except transformers_side.CannotLoad as error:
            report(f"served: {error}")
            return False
        was, now = self._config.norm, stated.norm
        centred = was == "layer_norm_without_parameters" and now != was
        found = compare(OurModel(self._reader, self._config, tokens), seen, centred=centred)
        for line in _lines(found, tokens):
            report(f"served: {line}")
        window, length = self._config.sliding_window, tokens.shape[1]
        if window is not None and window >= length:
            report(
                f"served: note: its window of {window} positions is not felt in {length} tokens; it"
                f" was compared in {CONFIG}"
            )
        return found.first is None


def _named(form: Form) -> str:
    names = ", ".join(one.name for one in form.rewritings)
    return f"{form.model_type}{f' after rewriting: {names}' if names else ''}"


def _lines(found: Comparison, tokens: np.ndarray) -> Iterator[str]:
    rows, length = tokens.shape
    where = f"transformers {found.version} on {rows} x {length} tokens"
    first, last = found.first, found.parts[-1]
    if first is None:
        worst = max(found.parts[:-1], key=lambda part: part.difference / max(part.size, 1e-30))
        yield (
            f"{where}: every part of every layer is this model's (the largest difference:"
            f" {worst.difference:.2g} of {worst.size:.3g}, {worst.part})"
        )
    else:
        yield (
            f"{where}: the first part that differs is {first.part}: by up to"
            f" {first.difference:.3g}, of values up to {first.size:.3g}"
        )
        others = [part.part for part in found.first_of_each if part is not first]
        if others:
            yield f"given what transformers' layers get, these differ too: {_few(others)}"
    yield f"{last.part}: differ by up to {last.difference:.2g}, of values up to {last.size:.3g}"
    if found.ties:
        yield (
            f"{found.ties} times a router chose between experts whose logits are equal but for"
            " rounding: their outputs were not compared"
        )


def _few(names: list[str]) -> str:
    return ", ".join(shorten(names, 6))


def _check_endpoint(server: Endpoint, ours: OurModel, tokens: np.ndarray, report: Report) -> bool:
    """Compares log-probabilities of the tokens."""
    streams = jnp.asarray(ours.embedded)[None]
    for index in range(ours.config.num_layers):
        streams = jnp.asarray(ours.layer(index, streams).output)
    logprobs = jax.nn.log_softmax(ours.logits(streams)[0], axis=-1)
    mine = np.take_along_axis(np.asarray(logprobs)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    given = np.stack([server.prompt_logprobs(row) for row in tokens])
    gaps = np.abs(mine - given)
    worst = np.unravel_index(gaps.argmax(), gaps.shape)
    report(
        f"served: {server.model} at the endpoint: log-probabilities of {gaps.size} tokens differ by"
        f" {gaps.mean():.2g} on average, by up to {gaps.max():.2g} (row {worst[0]}, token"
        f" {worst[1] + 1}: {mine[worst]:.4f} here, {given[worst]:.4f} there)"
    )
    return bool(gaps.mean() <= MEAN_LOGPROB_TOLERANCE)
