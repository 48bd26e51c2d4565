"""Tables and figures of the sparse-upcycling paper (Komatsuzaki et al., ICLR 2023, arXiv
2212.05055) as data; every number with its kind.

The numbers are in `data/sparse_upcycling.csv`. A size that the paper prints is there as
printed; sizes of this project's models are never stored (`paper_sizes` computes them).
"""

import csv
import dataclasses
import difflib
import enum
import functools
import importlib.resources
from collections.abc import Mapping, Sequence

PAPER = "Komatsuzaki et al., Sparse Upcycling, ICLR 2023 (arXiv 2212.05055)"


class Kind(enum.StrEnum):
    """How a number of the paper is known."""

    PRINTED = "printed"
    READ_OFF = "read off"
    BY_EYE = "by eye"
    NOT_KNOWN = "not known"


KIND_NOTES = {
    Kind.PRINTED: "stands in the paper's text or a table",
    Kind.READ_OFF: "measured in the figure's image: about 0.1 point in y, 1 % in x",
    Kind.BY_EYE: "estimated from the figure: about 0.1 to 0.3 point",
    Kind.NOT_KNOWN: "the paper plots it, its value is not known here",
}


class Method(enum.StrEnum):
    """What a curve or a row is about."""

    START = "start"
    DENSE = "dense"
    UPCYCLED = "upcycled"
    SCRATCH = "scratch"
    DEPTH_TILED = "depth_tiled"
    SPARSE = "sparse"


METHOD_LABELS = {
    Method.START: "dense checkpoint (start)",
    Method.DENSE: "dense continuation",
    Method.UPCYCLED: "upcycled",
    Method.SCRATCH: "MoE from scratch",
    Method.DEPTH_TILED: "depth-tiled dense",
    Method.SPARSE: "MoE",
}

MODALITIES = ("language", "vision")

METRICS = {
    "parameters": "parameters",
    "c4_accuracy": "C4 validation token accuracy, %",
    "superglue": "SuperGLUE average",
    "jft_precision_at_1": "JFT-300M precision@1, %",
    "imagenet_10shot": "ImageNet 10-shot accuracy, %",
    "imagenet_full_finetune": "ImageNet fine-tuned accuracy, %",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One number of the paper.

    Attributes:
      place: the exhibit, e.g. 'figure2'.
      part: panel of a figure, or ''.
      modality: 'language' or 'vision'.
      size: the paper's name of the model size.
      method: what it is about.
      setting: what else distinguishes it, e.g. {'C': '2'}; empty for the paper's default.
      metric: a key of `METRICS`.
      x: position on the figure's x axis, or None.
      x_unit: unit of `x`.
      extra_steps: steps after the start of upcycling; inferred (one plotted point is 100k steps),
        or None where not known.
      value: the number; percent for accuracies, a count for parameters; None where it is not known.
      printed: as the paper prints it, or ''.
      kind: how it is known.
    """

    place: str
    part: str
    modality: str
    size: str
    method: Method
    setting: Mapping[str, str]
    metric: str
    x: float | None
    x_unit: str
    extra_steps: int | None
    value: float | None
    printed: str
    kind: Kind

    @property
    def series(self) -> tuple:
        """Equal for the points of one curve (or one row of a table, per metric)."""
        return (
            self.part,
            self.modality,
            self.size,
            self.method,
            tuple(self.setting.items()),
            self.metric,
            self.x_unit,
        )


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of a figure, or one metric of a table's row.

    Attributes:
      points: its points, in the order of the paper; never empty.
    """

    points: tuple[Point, ...]

    @property
    def head(self) -> Point:
        """A point that has what all share: part, modality, size, method, setting, metric."""
        return self.points[0]

    @property
    def label(self) -> str:
        """For people, e.g. 'Base upcycled C=2'."""
        settings = " ".join(f"{name}={value}" for name, value in self.head.setting.items())
        return " ".join(filter(None, (self.head.size, METHOD_LABELS[self.head.method], settings)))


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table or a figure.

    Attributes:
      name: as the command takes it, e.g. 'figure2'.
      title: its place in the paper and what it shows.
      note: what a reader must know to compare.
      points: all of its curves and numbers that are known; empty where only `claims` are.
      claims: what the paper says that it shows.
    """

    name: str
    title: str
    note: str
    points: tuple[Point, ...]
    claims: tuple[str, ...] = ()

    def series(self, modality: str) -> list[Series]:
        """The curves of one modality, in the order of the data."""
        groups: dict[tuple, list[Point]] = {}
        for point in self.points:
            if point.modality == modality:
                groups.setdefault(point.series, []).append(point)
        return [Series(tuple(group)) for group in groups.values()]

    @property
    def modalities(self) -> list[str]:
        """'language' first."""
        return sorted({point.modality for point in self.points})


_STEPS = (
    "Extra steps are inferred: a plotted point of Base and Large is 100k steps (appendix B.7 and"
    " the spacing of figure 2)."
)

TITLES: dict[str, tuple[str, str]] = {
    "table1": (
        "Table 1: sizes of the models",
        "Sizes of this project are counted from the shapes of the shipped model files.",
    ),
    "table2": ("Table 2: router, capacity and start, L/32 at equal steps", ""),
    "table3": ("Table 3: renormalised combine weights, V-MoE-B/32 from scratch, Expert Choice", ""),
    "figure2": (
        "Figure 2: pre-training quality against extra cost, dense continuation and upcycled",
        _STEPS,
    ),
    "figure3": (
        "Figure 3: quality after full fine-tuning, along pre-training",
        f"Language: average SuperGLUE score after 200k fine-tuning steps, mean of 3 runs. {_STEPS}",
    ),
    "figure4": ("Figure 4: upcycled against MoE from scratch", _STEPS),
    "figure5": (
        (
            "Figure 5: upcycled against a deeper dense model made of the same checkpoint (depth"
            " tiling)"
        ),
        (
            "The paper says only that the number of layers grows until the run time is that of the"
            f" sparse model. {_STEPS}"
        ),
    ),
    "figure6": (
        "Figure 6: amount of dense pre-training before upcycling (B/16, C=1, 200k extra steps)",
        "",
    ),
    "figure8": (
        "Figure 8: router of the upcycled Base",
        (
            "First and last value of each curve. Here the router named is the encoder's; the"
            " decoder stays top-2 (the paper does not say)."
        ),
    ),
    "figure9": ("Figure 9: capacity factor", "Last value of each curve."),
    "figure10": (
        "Figure 10: number of MoE layers, the last n blocks (B/16)",
        (
            "Which n are plotted is not known here: 1 to 11, because the sweep stops there (the"
            " first block stays dense)."
        ),
    ),
    "figure11": ("Figure 11: number of experts (B/16, 7 extra epochs)", ""),
    "figure12": (
        "Figure 12: number of MoE layers, the last n blocks, at equal steps (B/16, C=1)",
        "Which n are plotted is not known here: 1 to 11 are taken.",
    ),
    "figure13": ("Figure 13: copied experts, at step 0 and after 600k steps (B/16)", ""),
    "figure14": (
        "Figure 14: with and without the dense optimizer state (B/16)",
        "Which numbers of experts are plotted is not known here: those of figure 13 are taken.",
    ),
    "figure15": (
        "Figure 15: the drop at step 0 against capacity and renormalised weights",
        "--checkpoint=PATH computes it from a dense vision transformer, without training.",
    ),
    "b7": ("Appendix B.7: renormalised combine weights, language, after 1M extra steps", ""),
}
"""Exhibit -> title and note, in the order of the paper."""

CLAIMS: dict[str, tuple[str, ...]] = {
    "figure9": ("Vision: C of 2 to 3 beats 1 and 5 at equal compute.",),
    "figure10": ("Experts in the last 5 or 6 blocks, 40 to 50 %, are best.",),
    "figure12": ("More MoE layers are not better, even at equal steps.",),
    "figure13": (
        "Random experts need most of the extra budget to catch up with copies.",
        "Copying only some experts is worse than copying all.",
    ),
    "figure14": ("Loading the optimizer state helps vision, with every number of experts.",),
    "figure15": (
        (
            "With renormalised weights and a large capacity the upcycled model equals the dense one"
            " at the first step."
        ),
    ),
}
"""What the paper says of figures, where a number alone does not."""


def _point(row: Mapping[str, str]) -> Point:
    return Point(
        place=row["place"],
        part=row["part"],
        modality=row["modality"],
        size=row["size"],
        method=Method(row["method"]),
        setting=dict(part.split("=", 1) for part in row["setting"].split()),
        metric=row["metric"],
        x=float(row["x"]) if row["x"] else None,
        x_unit=row["x_unit"],
        extra_steps=int(row["extra_steps"]) if row["extra_steps"] else None,
        value=float(row["value"]) if row["value"] else None,
        printed=row["printed"],
        kind=Kind(row["kind"]),
    )


@functools.cache
def exhibits() -> Mapping[str, Exhibit]:
    """All tables and figures of which numbers are known, in the order of the paper."""
    text = (
        importlib.resources.files("upcycle_jax.papers")
        .joinpath("data/sparse_upcycling.csv")
        .read_text(encoding="utf-8")
    )
    points = [_point(row) for row in csv.DictReader(text.splitlines())]
    return {
        name: Exhibit(
            name,
            title,
            note,
            tuple(point for point in points if point.place == name),
            CLAIMS.get(name, ()),
        )
        for name, (title, note) in TITLES.items()
    }


def exhibit(name: str) -> Exhibit:
    """One table or figure; 'Figure 2', 'fig2' and 'appendix B.7' are understood too.

    Raises:
      ValueError: there is none of that name, or none of its numbers are known.
    """
    known = exhibits()
    plain = name.lower().replace(" ", "").replace(".", "").replace("_", "").removeprefix("appendix")
    if plain.startswith("fig") and not plain.startswith("figure"):
        plain = f"figure{plain[3:]}"
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"no numbers of {name!r} are known here.{hint} Known: {', '.join(known)}")
    return known[plain]


def listing(chosen: Sequence[Exhibit]) -> list[tuple[str, str, str]]:
    """Rows for people: name, title, how many numbers of which kinds and modalities."""
    rows = []
    for item in chosen:
        kinds = ", ".join(
            f"{sum(p.kind == kind for p in item.points)} {kind}"
            for kind in Kind
            if any(p.kind == kind for p in item.points)
        )
        kinds = kinds or "none, a statement"
        vision = (
            ""
            if item.modalities == ["language"]
            else ("; with vision" if "language" in item.modalities else "; vision only")
        )
        rows.append((item.name, item.title, f"{kinds}{vision}"))
    return rows
