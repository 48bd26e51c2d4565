"""What upcycling does to a vision transformer before its first update: loss, precision at 1 and
10-shot accuracy of a dense checkpoint and of the models that it becomes with other numbers of
experts, capacities, weights and blocks. Nothing is trained, nothing but the results is written:
figures 13 (step 0) and 15 of the paper from any dense checkpoint, in minutes.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from upcycle_jax import checks, state_tree, surgery, trees
from upcycle_jax.checkpoints import CheckpointReader, loading, open_checkpoint
from upcycle_jax.checkpoints.verification import VerifiedReader
from upcycle_jax.data.images import ImageDataset, ImageDatasetConfig
from upcycle_jax.inference import few_shot
from upcycle_jax.inference.few_shot_evaluation import feature_function
from upcycle_jax.models.metrics import Mean
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.policy import expert_capacity
from upcycle_jax.moe.routing import ExpertsChoose
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.recipe import CopyExperts, FreshExperts, Recipe
from upcycle_jax.training import batches
from upcycle_jax.types import Batch, PyTree

_log = logging.getLogger(__name__)

EXHIBITS = ("figure13", "figure15")
"""What can be computed from a dense checkpoint."""
EQUAL = 1e-5
"""Of the dense loss: a smaller difference is rounding."""

Init = Literal["copy", "random"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """An upcycled model at step 0, otherwise as the paper's for vision.

    Attributes:
      num_experts: E.
      capacity_factor: C.
      renormalize: each token's combine weights are divided by their sum.
      blocks: which have experts.
      init: experts are copies of the MLP, or random.
    """

    num_experts: int
    capacity_factor: float
    renormalize: bool
    blocks: tuple[int, ...]
    init: Init = "copy"

    @property
    def room_for_all(self) -> bool:
        """Every expert takes every token."""
        return self.capacity_factor >= self.num_experts


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model on the evaluation images.

    Attributes:
      cell: None for the dense model.
      actual_capacity: mean experts of a token, C after rounding; None for the dense model.
      loss: cross entropy per image, nats.
      precision: at 1, percent.
      few_shot: accuracy of the features, percent, mean over seeds; None where not asked for.
    """

    cell: Cell | None
    actual_capacity: float | None
    loss: float
    precision: float
    few_shot: float | None


@dataclasses.dataclass(frozen=True)
class Drops:
    """What was measured for an exhibit.

    Attributes:
      exhibit: its name.
      checkpoint: the dense checkpoint.
      images: evaluated.
      rows: the dense model, then the cells.
    """

    exhibit: str
    checkpoint: str
    images: int
    rows: tuple[Measured, ...]

    @property
    def dense(self) -> Measured:
        """The dense model."""
        return self.rows[0]

    def is_equal(self, row: Measured) -> bool:
        """Whether a row is the dense model but for rounding."""
        scale = max(1.0, abs(self.dense.loss))
        return abs(row.loss - self.dense.loss) <= EQUAL * scale

    @property
    def expected_equal(self) -> list[Measured]:
        """Rows that must be equal: copies with room for every token at every expert, whose weights
        sum to 1 even as they are, being all of a softmax.
        """
        return [
            row
            for row in self.rows[1:]
            if row.cell and row.cell.init == "copy" and row.cell.room_for_all
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialDrop:
    """Measures a dense checkpoint and what it becomes at step 0.

    Attributes:
      model: the dense vision transformer.
      dataset_cfg: labelled images to evaluate on.
      checkpoint_path: the dense checkpoint in any readable format, or a MODEL_DIR.
      num_experts: of figure 13; figure 15 takes the one nearest to 8.
      capacity_factors: of figure 15, to which E is added: room for all.
      images_per_group: images whose tokens experts choose from; the paper does not print it.
      num_batches: of evaluation; None for the whole split.
      few_shot_cfg: images of few-shot evaluation; None for none.
      shots: of each class.
      num_seeds: draws of those, averaged.
      views: of each image, for few-shot evaluation.
      seed: of routers and random experts.
      partitioner: the mesh.

    Raises:
      ValueError: the model has experts, or is no vision transformer.
    """

    model: VitModel
    dataset_cfg: checks.Dataset
    checkpoint_path: checks.PathText | os.PathLike
    num_experts: tuple[checks.Experts, ...] = (2, 8, 32)
    capacity_factors: tuple[checks.Positive, ...] = (1.0, 2.0, 4.0)
    images_per_group: checks.Size = 8
    num_batches: checks.Count | None = 16
    few_shot_cfg: checks.Dataset | None = None
    shots: checks.Count = 10
    num_seeds: checks.Count = 5
    views: checks.Count = 4
    seed: checks.Seed = 0
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if not isinstance(self.model, VitModel) or self.model.config.moe is not None:
            raise ValueError(
                "the drop at step 0 is measured from a dense vision transformer: give one of"
                " models/vit_*.gin without 'upcycled'"
            )
        for data in (self.dataset_cfg, self.few_shot_cfg):
            if data is not None and not isinstance(data, ImageDatasetConfig):
                raise ValueError(
                    f"the drop at step 0 is measured on images, not {type(data).__name__}: give"
                    " @ImageDatasetConfig()"
                )
        if not self.num_experts or not self.capacity_factors:
            raise ValueError("num_experts and capacity_factors name one value at least")

    def cells(self, exhibit: str) -> list[Cell]:
        """What an exhibit shows at step 0.

        Raises:
          ValueError: it shows nothing there.
        """
        layers = self.model.config.num_layers
        last_half = tuple(range(layers - layers // 2, layers))
        if exhibit == "figure13":
            inits: tuple[Init, ...] = ("copy", "random")
            return [
                Cell(experts, 2.0, renormalize=True, blocks=last_half, init=init)
                for experts in self.num_experts
                for init in inits
            ]
        if exhibit != "figure15":
            raise ValueError(
                f"{exhibit} is made by training: {' and '.join(EXHIBITS)} are computed from a"
                " dense checkpoint"
            )
        experts = min(self.num_experts, key=lambda count: (abs(count - 8), count))
        smaller = [c for c in sorted(set(self.capacity_factors)) if c < experts]
        by_capacity = [
            Cell(experts, capacity, renormalize=renormalize, blocks=last_half)
            for renormalize in (True, False)
            for capacity in (*smaller, float(experts))
        ]
        least = by_capacity[0].capacity_factor
        ends = (
            [Cell(experts, least, renormalize=True, blocks=(i,)) for i in (0, layers - 1)]
            if layers > 1
            else []
        )
        return by_capacity + ends

    def measure(self, exhibit: str) -> Drops:
        """Evaluates the dense model and every cell.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: it is not one of the model, or damaged; or the images do not fit.
        """
        cells = self.cells(exhibit)
        reader = open_checkpoint(self.checkpoint_path)
        loading.check_params(reader, self.model)
        images = ImageDataset(self.dataset_cfg, self.model.features)
        count = len(images.images.labels)
        size = self.dataset_cfg.batch_size
        if self.num_batches is not None:
            count = min(count, size * self.num_batches)
        self._check_groups(self.dataset_cfg)
        few = self._few_shot_images()
        dense = loading.load_params(reader, self.model, self.partitioner)
        _log.info("the dense model on %s images", f"{count:,}")
        rows = [self._row(None, self.model, dense, images, few)]
        made: dict[tuple, PyTree] = {}
        measured: dict[Cell, Measured] = {}
        for cell in cells:
            if cell in measured:
                continue
            model = self.sparse_model(cell)
            key = (cell.num_experts, cell.blocks, cell.init)
            if key not in made:
                made = {key: self.upcycled(reader, model, cell)}  # One at a time: they are large.
            _log.info("%s", cell)
            measured[cell] = self._row(cell, model, made[key], images, few)
        rows += [measured[cell] for cell in cells]
        return Drops(exhibit, str(reader.path), count, tuple(rows))

    def sparse_model(self, cell: Cell) -> VitModel:
        """The model of a cell."""
        config: VitConfig = self.model.config
        moe = VitMoeConfig(
            num_experts=cell.num_experts,
            router=ExpertsChoose(renormalize=cell.renormalize),
            sparse_layout=cell.blocks,
            group_size=self._group_size,
            train_expert_capacity_factor=cell.capacity_factor,
            eval_expert_capacity_factor=cell.capacity_factor,
            min_expert_capacity=1,
        )
        return VitModel(dataclasses.replace(config, moe=moe), loss=self.model.loss)

    def upcycled(self, reader: CheckpointReader, model: VitModel, cell: Cell) -> PyTree:
        """The parameters of a cell, on the devices."""
        recipe = Recipe(
            expert_init=CopyExperts() if cell.init == "copy" else FreshExperts(), seed=self.seed
        )
        specs = state_tree.parameter_specs(model.param_specs())
        verified: Any = VerifiedReader(reader)
        plan = surgery.make_plan(verified.specs(), specs, recipe)
        flat = surgery.apply_online(plan, verified, self.partitioner.shardings(specs))
        return trees.unflatten({path.removeprefix(TARGET): leaf for path, leaf in flat.items()})

    @property
    def _group_size(self) -> int:
        return self.images_per_group * self.model.config.num_tokens

    def _check_groups(self, data: ImageDatasetConfig) -> None:
        if data.batch_size % self.images_per_group:
            raise ValueError(
                f"BATCH_SIZE {data.batch_size} does not divide into groups of"
                f" {self.images_per_group} images: change either"
            )
        batches.data_layout(self.partitioner, data.batch_size)

    def _few_shot_images(self) -> ImageDataset | None:
        if self.few_shot_cfg is None:
            return None
        self._check_groups(self.few_shot_cfg)
        features = dataclasses.replace(self.model.features, num_classes=0)
        images = ImageDataset(self.few_shot_cfg, features)
        labels = np.tile(images.images.labels, self.views)
        for seed in range(self.num_seeds):
            few_shot.draw(labels, self.shots, seed)  # Says what is missing before features are.
        return images

    def _row(
        self,
        cell: Cell | None,
        model: VitModel,
        params: PyTree,
        images: ImageDataset,
        few: ImageDataset | None,
    ) -> Measured:
        loss, precision = self._evaluated(model, params, images)
        accuracy = None
        if few is not None:
            features = feature_function(model, self.partitioner, few, views=self.views)(params)
            labels = np.tile(few.images.labels, self.views)
            accuracies = [
                few_shot.accuracy(features, labels, shots=self.shots, seed=seed)
                for seed in range(self.num_seeds)
            ]
            accuracy = 100 * float(np.mean(accuracies))
        capacity = None if cell is None else self._actual_capacity(cell)
        return Measured(cell, capacity, loss, 100 * precision, accuracy)

    def _evaluated(
        self, model: VitModel, params: PyTree, images: ImageDataset
    ) -> tuple[float, float]:
        """Cross entropy per image and precision at 1, a share."""
        names = ("cross_ent_loss", "accuracy")

        # The other metrics are not compiled.
        @functools.partial(jax.jit, out_shardings=self.partitioner.replicated)
        def means(params: PyTree, batch: Batch) -> list[Mean]:
            found = model.eval_fn(params, batch)
            return [found[name] for name in names]

        layout = batches.data_layout(self.partitioner, self.dataset_cfg.batch_size)
        (run,) = images.eval_batches(self.num_batches, layout.shard, layout.num_shards).values()
        totals, weights = np.zeros(len(names)), np.zeros(len(names))
        for batch in run():
            placed = batches.to_global(batch, self.partitioner, layout.num_shards)
            with self.partitioner.activate():
                found = means(params, placed)
            totals += [float(mean.total) for mean in found]
            weights += [float(mean.weight) for mean in found]
        loss, precision = totals / weights
        return float(loss), float(precision)

    def _actual_capacity(self, cell: Cell) -> float:
        size, experts = self._group_size, cell.num_experts
        slots = expert_capacity(
            size,
            num_experts=experts,
            capacity_factor=cell.capacity_factor,
            min_expert_capacity=1,
        )
        return min(slots, size) * experts / size


def claims(drops: Drops) -> list[str]:
    """What the rows say of the paper's claims, one sentence each."""
    out = []
    for row in drops.expected_equal:
        assert row.cell is not None
        difference = abs(row.loss - drops.dense.loss)
        verdict = "equals the dense model" if drops.is_equal(row) else "DIFFERS from the dense one"
        weights = "renormalised weights" if row.cell.renormalize else "weights as they are"
        out.append(
            f"With {weights} and room for every token (C = E = {row.cell.num_experts}) the upcycled"
            f" model {verdict}: the losses differ by {difference:.1e}."
        )
    out += _ends(drops)
    return out


def _ends(drops: Drops) -> list[str]:
    """First block against last block."""
    single = {
        row.cell.blocks[0]: row for row in drops.rows[1:] if row.cell and len(row.cell.blocks) == 1
    }
    if len(single) < 2:
        return []
    first, last = single[min(single)], single[max(single)]
    worse = "more" if first.loss > last.loss else "NOT more"
    if drops.is_equal(first) and drops.is_equal(last):
        return ["Experts in one block alone change nothing, in the first and in the last."]
    return [
        f"Experts in the first block alone cost {worse} than in the last block alone: loss"
        f" {first.loss - drops.dense.loss:+.4f} against {last.loss - drops.dense.loss:+.4f}."
    ]


def figure(drops: Drops) -> bytes:
    """The rows as a picture (PNG)."""
    from upcycle_jax.studies import plots

    return plots.png(_plotted(drops))


def _plotted(drops: Drops) -> Any:
    from upcycle_jax.studies.plots import COLOURS, MARKERS, plt

    by_experts = drops.exhibit == "figure13"
    picture, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    many = [row for row in drops.rows[1:] if row.cell and len(row.cell.blocks) > 1] or [
        *drops.rows[1:]
    ]
    groups: dict[str, list[Measured]] = {}
    for row in many:
        assert row.cell is not None
        name = (
            {"copy": "copied experts", "random": "random experts"}[row.cell.init]
            if by_experts
            else ("renormalised weights" if row.cell.renormalize else "weights as they are")
        )
        groups.setdefault(name, []).append(row)
    values: Sequence[tuple[Any, str, str]] = (
        (panels[0], "loss", "loss (nats per image)"),
        (panels[1], "precision", "precision at 1 (%)"),
    )
    for panel, name, label in values:
        for number, (group, rows) in enumerate(groups.items()):
            where = [
                row.cell.num_experts if by_experts else row.actual_capacity
                for row in rows
                if row.cell
            ]
            panel.plot(
                where,
                [getattr(row, name) for row in rows],
                label=group,
                color=COLOURS[number],
                marker=MARKERS[number],
            )
        panel.axhline(getattr(drops.dense, name), color="black", linestyle=":", label="dense")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("experts" if by_experts else "experts per token (C)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    return picture
