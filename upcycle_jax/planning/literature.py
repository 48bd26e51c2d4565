"""What the literature says about a planned upcycling, each statement with source and kind, and
whether the plan lies inside what was tried.

Nothing here is computed by this project: it is what was published, as far as it was read.
"""

import dataclasses
import enum
from collections.abc import Callable


class Kind(enum.StrEnum):
    """How a statement is known."""

    PRINTED = "printed"
    READ_OFF = "read off a figure"
    SECOND_HAND = "second-hand notes"
    CODE = "released code"


class Stance(enum.StrEnum):
    """What the evidence says about the user's case."""

    SUPPORTS = "supports"
    WARNS = "warns"
    NOTE = "note"
    OUTSIDE = "outside the evidence"


SPARSE_UPCYCLING = "Sparse Upcycling, arXiv 2212.05055"
NVIDIA = "Upcycling LLMs into MoE, arXiv 2410.07524"
SKYWORK = "Skywork-MoE, arXiv 2406.06563"
MEGABLOCKS = "MegaBlocks, arXiv 2211.15841"
OLMOE = "OLMoE, arXiv 2409.02060"
LLAMA = "Llama 3 Meets MoE, arXiv 2412.09952"
DROP = "Drop-Upcycling, arXiv 2502.19261"
SCALING = "Scaling laws for upcycling, arXiv 2502.03009"

OVER_TRAINED = 1000
"""Dense tokens per parameter from which a parent counts as trained far beyond its size: between T5
1.1 Base (about 650) and OLMo 1B.
"""
PAPER_PARAMETERS = (248e6, 2.85e9)
"""Smallest and largest dense language model of the paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a user plans.

    Attributes:
      dense_parameters: of the dense model.
      dense_tokens: that the dense checkpoint was trained on, padding included; None where not
        known.
      extra_share: FLOPs of the extra training over those of the dense training so far; None where
        not known.
      batch_tokens: positions of a batch.
      num_experts: E.
      capacity_factor: of training; None for routers that drop nothing and have none.
      router: 'experts_choose' or 'tokens_choose': that of the first stack with MoE layers.
      renormalize: combine weights of either stack are scaled to sum 1.
      sparse_share: MoE layers over all layers.
    """

    dense_parameters: int
    dense_tokens: float | None
    extra_share: float | None
    batch_tokens: int
    num_experts: int
    capacity_factor: float | None
    router: str
    renormalize: bool
    sparse_share: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """One statement about a case.

    Attributes:
      topic: what it is about.
      stance: what it means for the case.
      text: what was found, and where the case stands.
      source: the publication and the place in it.
      kind: how it is known here.
    """

    topic: str
    stance: Stance
    text: str
    source: str
    kind: Kind


def advise(case: Case) -> list[Advice]:
    """Everything that is known about a case, by topic."""
    return [line for topic in TOPICS for line in topic(case)]


def _scratch(case: Case) -> list[Advice]:
    topic = "upcycle or scratch"
    share = case.extra_share
    if share is None:
        text = (
            "how the extra budget compares with that of the dense checkpoint decides this: give"
            " --dense_steps"
        )
        return [Advice(topic, Stance.NOTE, text, SPARSE_UPCYCLING, Kind.PRINTED)]
    mine = f"this plan spends {share:.0%}"
    low, high = PAPER_PARAMETERS
    out = []
    if not low / 2 <= case.dense_parameters <= high * 2:
        text = (
            "the paper's language models have 248M to 2.85B dense parameters, this one has"
            f" {case.dense_parameters / 1e9:.3g}B: what follows about budgets was not tried at this"
            " size"
        )
        out.append(
            Advice(topic, Stance.OUTSIDE, text, f"{SPARSE_UPCYCLING}, table 1", Kind.PRINTED)
        )
    stance = Stance.SUPPORTS if share <= 1.0 else Stance.WARNS
    text = (
        "from scratch an MoE catches up with the upcycled T5 Base after about 120 % of the dense"
        f" model's cost; {mine}"
    )
    out.append(Advice(topic, stance, text, f"{SPARSE_UPCYCLING}, section 4.2", Kind.PRINTED))
    inside = 0.1 <= share <= 0.6
    where = "inside" if inside else "outside"
    text = (
        f"upcycling is most useful for +10 % to +60 % of the dense cost; {mine}: {where} that range"
    )
    out.append(
        Advice(
            topic,
            Stance.SUPPORTS if inside else Stance.NOTE,
            text,
            SPARSE_UPCYCLING,
            Kind.SECOND_HAND,
        )
    )
    text = (
        "for a decoder-only parent trained far beyond its size (1B parameters, 2T tokens) the MoE"
        f" from scratch caught up after 25 % of the dense budget; {mine}"
    )
    if case.dense_tokens is not None:
        text += (
            f", after {case.dense_tokens / case.dense_parameters:.0f} dense tokens per parameter"
            " (there about 2000)"
        )
    over_trained = (
        case.dense_tokens is not None and case.dense_tokens / case.dense_parameters > OVER_TRAINED
    )
    out.append(
        Advice(
            topic,
            Stance.WARNS if share > 0.25 and over_trained else Stance.NOTE,
            text,
            OLMOE,
            Kind.PRINTED,
        )
    )
    rule = (
        "their rule: far below the dense cost upcycle, from twice the dense cost on train from"
        " scratch"
    )
    stance = Stance.WARNS if share >= 2 else Stance.SUPPORTS if share <= 0.5 else Stance.NOTE
    out.append(Advice(topic, stance, f"{rule}; {mine}", SKYWORK, Kind.PRINTED))
    text = (
        "the longer the dense model was trained, the slower the upcycled one improves: upcycling"
        " pays below a number of extra tokens only"
    )
    out.append(Advice(topic, Stance.NOTE, text, f"{SCALING}, table 2", Kind.PRINTED))
    return out


def _capacity(case: Case) -> list[Advice]:
    topic, c = "capacity factor", case.capacity_factor
    if c is None:
        text = (
            "the router is dropless: no capacity is to be chosen, no token is dropped, and memory"
            " is reserved for any load"
        )
        return [Advice(topic, Stance.NOTE, text, MEGABLOCKS, Kind.PRINTED)]
    tried = (1.25, 2.0, 4.0, 6.0)
    stance = (
        Stance.SUPPORTS
        if c == 2.0
        else Stance.WARNS
        if c in tried
        else Stance.OUTSIDE
        if not 1.25 <= c <= 6
        else Stance.NOTE
    )
    text = (
        "T5 Base, expert choice: C=2 is best at every budget among 1.25, 2, 4 and 6; this plan has"
        f" C={c:g}"
    )
    out = [Advice(topic, stance, text, f"{SPARSE_UPCYCLING}, figure 9", Kind.READ_OFF)]
    text = (
        "Llama 3 8B, 8 experts, 27B tokens, C = 1, 2, 4: MMLU 63.3, 63.9, 63.8, so hardly"
        " different; utilisation 46.8, 39.2, 39.4 %"
    )
    return [*out, Advice(topic, Stance.NOTE, text, f"{LLAMA}, capacity factors", Kind.PRINTED)]


def _experts(case: Case) -> list[Advice]:
    topic, e = "number of experts", case.num_experts
    inside = e == 32
    text = (
        "32 experts were chosen for language and tried alone, for +20 % to +100 % of the dense"
        f" cost; this plan has {e}"
    )
    out = [
        Advice(
            topic,
            Stance.SUPPORTS if inside else Stance.OUTSIDE,
            text,
            SPARSE_UPCYCLING,
            Kind.SECOND_HAND,
        )
    ]
    text = (
        "vision (B/16, 7 extra epochs), JFT precision@1 with 2, 4, 8, 16, 32, 64, 128 experts:"
        " 49.8, 50.6, 51.2, 52.1, 52.9, 53.5, 53.9"
    )
    out.append(Advice(topic, Stance.NOTE, text, f"{SPARSE_UPCYCLING}, figure 11", Kind.READ_OFF))
    text = "decoder-only 15B: 64 fine-grained experts best, 128 to 256 gain nothing"
    return [
        *out,
        Advice(topic, Stance.WARNS if e > 64 else Stance.NOTE, text, NVIDIA, Kind.PRINTED),
    ]


def _layers(case: Case) -> list[Advice]:
    topic = "MoE layers"
    half = abs(case.sparse_share - 0.5) < 0.01
    text = (
        "language: every second layer of both stacks; this plan has MoE layers in"
        f" {case.sparse_share:.0%} of them"
    )
    out = [
        Advice(
            topic,
            Stance.SUPPORTS if half else Stance.OUTSIDE,
            text,
            f"{SPARSE_UPCYCLING}, table 1",
            Kind.PRINTED,
        )
    ]
    text = "vision: 40 to 50 % of the layers best, more are not better even per step"
    return [
        *out,
        Advice(topic, Stance.NOTE, text, f"{SPARSE_UPCYCLING}, figures 10 and 12", Kind.READ_OFF),
    ]


def _routing(case: Case) -> list[Advice]:
    topic = "routing"
    choose = case.router == "experts_choose"
    text = (
        "T5 Base at 31 core-days: expert choice 70.3, top-2 with batch priority 69.8, top-1 69.1 %"
        " C4 accuracy"
    )
    out = [
        Advice(
            topic,
            Stance.SUPPORTS if choose else Stance.WARNS,
            text,
            f"{SPARSE_UPCYCLING}, figure 8",
            Kind.READ_OFF,
        )
    ]
    text = (
        "language without renormalised combine weights: 70.8 against 70.7 % C4 accuracy, 79.3"
        " against 78.8 SuperGLUE"
    )
    stance = Stance.WARNS if case.renormalize else Stance.SUPPORTS
    out.append(Advice(topic, stance, text, f"{SPARSE_UPCYCLING}, appendix B.7", Kind.PRINTED))
    text = "top-k: softmax before top-k was consistently better"
    out.append(
        Advice(
            topic, Stance.NOTE, f"{text} (the next line says the opposite)", NVIDIA, Kind.PRINTED
        )
    )
    text = "top-k: softmax after top-k starts lower and converges faster"
    return [*out, Advice(topic, Stance.NOTE, text, LLAMA, Kind.PRINTED)]


def _learning_rate(case: Case) -> list[Advice]:
    topic = "learning rate"
    text = (
        "inverse square root: the schedule goes on at the dense checkpoint's step without a jump;"
        " optimizer state starts afresh"
    )
    out = [Advice(topic, Stance.NOTE, text, f"{SPARSE_UPCYCLING}, section 3.1", Kind.SECOND_HAND)]
    text = (
        "cosine parents: go back to the peak of pre-training and decay again; at the constant"
        " minimum the model stays a copy and plateaus"
    )
    out.append(Advice(topic, Stance.NOTE, text, NVIDIA, Kind.PRINTED))
    text = (
        "0.3B parent: from its 100B-token checkpoint a peak of 1.8e-3 (loss 2.23), from the"
        " 300B-token one a constant 3e-4 (2.25)"
    )
    out.append(Advice(topic, Stance.NOTE, text, SKYWORK, Kind.READ_OFF))
    text = (
        f"4M tokens better than 2M, 32M worst; this plan has {case.batch_tokens / 1e6:.2g}M (the"
        " paper's is not known)"
    )
    return [*out, Advice("batch", Stance.NOTE, text, NVIDIA, Kind.PRINTED)]


def _start(case: Case) -> list[Advice]:
    del case  # the same for everybody
    topic = "start"
    text = (
        "without renormalised weights quality drops at first: SuperGLUE of T5 Base is below the"
        " dense model's for about 300k of 1M steps"
    )
    out = [Advice(topic, Stance.NOTE, text, f"{SPARSE_UPCYCLING}, figure 3", Kind.READ_OFF)]
    text = "copied experts: small noise on them changes nothing, large noise harms"
    out.append(Advice(topic, Stance.NOTE, text, SPARSE_UPCYCLING, Kind.SECOND_HAND))
    text = (
        "long runs: re-drawing half of each expert's hidden units (r = 0.5) beats plain copies;"
        " recipes/drop_upcycling.gin"
    )
    return [*out, Advice(topic, Stance.NOTE, text, DROP, Kind.SECOND_HAND)]


TOPICS: tuple[Callable[[Case], list[Advice]], ...] = (
    _scratch,
    _capacity,
    _experts,
    _layers,
    _routing,
    _learning_rate,
    _start,
)
