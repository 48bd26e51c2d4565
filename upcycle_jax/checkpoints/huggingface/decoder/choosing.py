"""In which forms a model can be written, and which of them is chosen."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Leaf
from upcycle_jax.checkpoints.huggingface.decoder import verdicts
from upcycle_jax.checkpoints.huggingface.decoder.holding import HOLDERS, why_not
from upcycle_jax.checkpoints.huggingface.decoder.rewriting import (
    Centred,
    Folded,
    HalfGate,
    Leaves,
    Padded,
    Rewriting,
    SharedInExperts,
    UntiedHead,
    ZeroBiases,
    ZeroSharedExpert,
)
from upcycle_jax.checkpoints.huggingface.decoder.verdicts import READERS
from upcycle_jax.checkpoints.huggingface.verdict import UNUSABLE, Kind, Verdict
from upcycle_jax.models.decoder.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to write a model.

    Attributes:
      model_type: as in config.json.
      source: the model before rewriting.
      config: the model as it is written.
      rewritings: in order.
      verdicts: what every reader makes of it.
    """

    model_type: str
    source: DecoderConfig
    config: DecoderConfig
    rewritings: tuple[Rewriting, ...]
    verdicts: tuple[Verdict, ...]

    def leaves(self, leaves: Leaves) -> dict[str, Leaf]:
        """The parameters as they are written."""
        config, out = self.source, dict(leaves)
        for one in self.rewritings:
            out = one.leaves(out, config)
            config = one.config(config)
        return out

    def verdict(self, reader: str) -> Verdict:
        """That of one reader."""
        return next(one for one in self.verdicts if one.reader == reader)

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "model_type": self.model_type,
            "rewritings": [one.name for one in self.rewritings],
            "verdicts": [one.json() for one in self.verdicts],
        }


def choose(
    config: DecoderConfig,
    *,
    model_type: str | None = None,
    readers: Sequence[str] = (),
    preferred: str | None = None,
) -> tuple[Form, str]:
    """The form to write, and why it is that one.

    Forms that every one of `readers` reads come first; then those that add no large parameters;
    then those that most readers read; then those that need no rewriting.

    Args:
      config: of the model.
      model_type: write this one; None: choose.
      readers: who has to read it.
      preferred: the type that the model was read as, where that is known.

    Raises:
      ValueError: no type can hold the model, or `model_type` cannot, or no form is read by all of
        `readers`; the message says why not.
    """
    unknown = [name for name in readers if name not in READERS]
    if unknown:
        raise ValueError(f"reader {unknown[0]!r} is not among {', '.join(READERS)}")
    if model_type is not None and model_type not in HOLDERS:
        raise ValueError(f"model_type {model_type!r} is not among {', '.join(HOLDERS)}")
    found = list(forms(config, model_type))
    if not found:
        raise ValueError(_nothing(config, model_type))
    ranked = sorted(found, key=lambda form: _rank(form, readers, preferred))
    best = ranked[0]
    refusing = [best.verdict(reader) for reader in readers if best.verdict(reader).kind in UNUSABLE]
    if refusing:
        lines = [f"{one.reader}: {one.kind}: {'; '.join(one.reasons)}" for one in refusing]
        raise ValueError(
            f"no form of this model{f' as {model_type}' if model_type else ''} is read by"
            f" {', '.join(readers)}. The nearest, {best.model_type}:\n" + "\n".join(lines)
        )
    return best, _why(best, found, model_type=model_type, readers=readers, preferred=preferred)


def forms(config: DecoderConfig, model_type: str | None = None) -> Iterator[Form]:
    """Every form in which a model can be written, as one type or as any."""
    for kind in HOLDERS if model_type is None else [model_type]:
        for rewritings in _chains(config, kind):
            after = config
            for one in rewritings:
                after = one.config(after)
            if not why_not(kind, after):
                names = [one.name for one in rewritings]
                found = verdicts.verdicts(kind, after, names)
                yield Form(kind, config, after, rewritings, found)


def _chains(config: DecoderConfig, kind: str) -> Iterator[tuple[Rewriting, ...]]:
    """The rewritings that bring a model nearer to a type, in each combination that could help."""
    holder = HOLDERS[kind]
    steps: list[list[tuple[Rewriting, ...]]] = []
    if config.norm == "layer_norm_without_parameters" and holder.norm == "rms":
        steps.append([(Centred(),)])
    if config.norm == "rms_plus_one" and holder.norm == "rms":
        steps.append([(Folded(),)])
    moe = config.moe
    if holder.moe is not None and moe is not None and config.sparse_layers:
        mixed = len(config.sparse_layers) < config.num_layers
        if mixed and Padded().why_not(config) is None:
            steps.append([(), (Padded(),)] if holder.moe.mixed else [(Padded(),)])
        if holder.moe.shared == "gated" and moe.shared_expert_mlp_dim is None:
            steps.append([(ZeroSharedExpert(),)])
        if (
            holder.moe.shared == "gated"
            and moe.shared_expert_mlp_dim
            and not moe.shared_expert_gate
        ):
            steps.append([(HalfGate(),)])
        if holder.moe.shared is None and SharedInExperts().why_not(config) is None:
            steps.append([(SharedInExperts(),)])
    if not config.qkv_bias and any(qkv for qkv, *_ in holder.biases) and kind.startswith("qwen2"):
        steps.append([(), (ZeroBiases(),)])
    untied = any(isinstance(one, Folded) for step in steps for chain in step for one in chain)
    if config.logits_via_embedding and not untied:
        steps.append([(), (UntiedHead(),)])
    for parts in itertools.product(*steps):
        yield tuple(itertools.chain.from_iterable(parts))


def _rank(form: Form, readers: Sequence[str], preferred: str | None) -> tuple[int, ...]:
    """Smaller is better."""
    unread = sum(form.verdict(reader).kind in UNUSABLE for reader in readers)
    large = sum(isinstance(one, Padded | SharedInExperts | UntiedHead) for one in form.rewritings)
    own = form.model_type == preferred and not form.rewritings
    lost = sum(one.kind in UNUSABLE for one in form.verdicts)
    near = sum(one.kind == Kind.NEAR for one in form.verdicts)
    order = list(HOLDERS).index(form.model_type)
    return (unread, large, not own, lost, near, len(form.rewritings), order)


def _why(
    best: Form,
    found: Sequence[Form],
    *,
    model_type: str | None,
    readers: Sequence[str],
    preferred: str | None,
) -> str:
    if model_type is not None:
        why = "as asked for"
    elif best.model_type == preferred and not best.rewritings:
        why = "what it was read as"
    else:
        others = list(dict.fromkeys(form.model_type for form in found))
        others.remove(best.model_type)
        why = (
            f"chosen among {best.model_type}, {', '.join(others)}"
            if others
            else "the only type that can hold it"
        )
    for_whom = f", for {', '.join(readers)}" if readers else ""
    names = ", ".join(one.name for one in best.rewritings)
    return f"{best.model_type}: {why}{for_whom}{f'; rewritten: {names}' if names else ''}"


def _nothing(config: DecoderConfig, model_type: str | None) -> str:
    """Why no type can hold a model: for each that comes near, what keeps it."""
    sparse = bool(config.sparse_layers)
    kinds = [model_type] if model_type else [k for k in HOLDERS if bool(HOLDERS[k].moe) == sparse]
    reasons = {}
    for kind in kinds:
        chain = next(_chains(config, kind), ())
        after = config
        for one in chain:
            after = one.config(after)
        reasons[kind] = why_not(kind, after)
    lines = [f"{kind}: {'; '.join(why)}" for kind, why in reasons.items()]
    lines.sort(key=lambda line: line.count(";"))
    what = "a Mixture-of-Experts" if sparse else "a dense model"
    padded = Padded().why_not(config) if sparse else None
    note = f"\nIts layers cannot be padded: {padded}" if padded and len(kinds) > 1 else ""
    return f"no Hugging Face type can hold this model, {what}:\n" + "\n".join(lines) + note
