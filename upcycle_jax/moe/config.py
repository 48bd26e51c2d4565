"""Settings of MoE layers, whatever the model."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from upcycle_jax import checks
from upcycle_jax.checks import Range
from upcycle_jax.moe.grouped_experts import DISPATCHES, Dispatch
from upcycle_jax.moe.routing import Router

CapacityFactor = Annotated[
    float,
    Range(
        above=0,
        at_most=2**20,
        hint="1.0 is room for an even share of the tokens; for room without a bound use"
        " DroplessTopK()",
    ),
]

CapacityRounding = Literal["round", "ceil", "floor"]
"""See `MoeSettings.capacity_rounding`."""


@dataclasses.dataclass(frozen=True)
class MoeSettings:
    """What the MoE layers of a model have in common. Which layers they are and how these route, a
    family of models adds.

    Attributes:
      num_experts: E, in every MoE layer. More experts mean more parameters and memory at the same
        FLOPs per token.
      expert_mlp_dim: hidden size of one expert; None for the dense MLP's.
      shared_expert_mlp_dim: hidden size of a dense MLP whose output for every token is added to
        that of the routed experts (Qwen2-MoE, arXiv 2407.10671; Nexus, arXiv 2408.15901); None for
        none.
      extra_mlp: every MoE layer is followed by a dense MLP with its own norm and residual, as wide
        as those of dense layers (ST-MoE, arXiv 2202.08906).
      group_size: GROUP_SIZE, the most tokens that are routed together. Larger groups balance better
        and cost longer sorts; under experts choose the group is also what each expert chooses from.
      train_expert_capacity_factor: slots per expert in multiples of its even share of the tokens.
        Under experts choose it is the average number of experts per token; under tokens choose a
        larger value only drops fewer tokens.
      eval_expert_capacity_factor: the same, when not training.
      min_expert_capacity: slots that an expert has at least, in every group.
      aux_loss_factor: weight of the load-balancing loss, averaged over all MoE layers. With
        perfect balance that loss is K (`moe.losses.load_balancing_loss`), as in transformers: a
        `router_aux_loss_coef` is taken over as it is. For one layer and one group the values are
        the same; for more, see `aux_loss`.
      router_z_loss_factor: weight of the router z-loss, averaged over all MoE layers.
      expert_dropout_rate: dropout inside experts; None for the dense rate.
      dispatch: how tokens reach experts. 'gather': by gathers into slots and scatters back, which
        routers with a capacity use unless told otherwise; dropless routers then have a slot of
        every expert for every token, of which few are computed first. For dropless routers alone:
        'sorted' sorts rows by expert and works them off in blocks; 'ragged_dot' is
        `jax.lax.ragged_dot`, refused where it becomes one masked product per expert; 'auto' is
        'ragged_dot' where that is one grouped product, else 'sorted', and the choice is logged.
        'one_hot': as 'gather', by products with masks `[S, E, C]`, as T5X does: slow, to compare
        with.
      ignore_padding_tokens: padding takes no expert's place. Off, padded positions are routed as
        zero vectors: their logits tie, ties go to the lowest index, and the first experts fill up
        with padding. None: on, but off in T5X mode, as Flaxformer has it.
      t5x_mode: group, pad, and count padding in losses and metrics exactly as Flaxformer does, and
        keep the decoder's first padded position where it does; results then depend on the mesh.
      num_expert_replicas: devices / (expert partitions x model partitions); used in T5X mode only.
      inference_routing: how tokens are routed when predicting and scoring. 'independent': the
        result for a sequence depends neither on the rest of its batch nor on padding (see
        `independent`). 'grouped': in groups over the batch with the evaluation capacity, as in
        evaluation and in T5X; a sequence then competes with its neighbours for experts.
      min_inference_capacity: stands in for `min_expert_capacity` where one sequence is a group. A
        group of 4096 tokens rarely meets that bound, a sequence of 20 would: 32 experts of 4 slots
        each are 6 experts per token instead of 2.
      independent: route as 'independent' says, at all times. Set by a model's `for_inference`;
        training so would never balance experts over more than one sequence. Routers that choose per
        token have room for every token. For routers that choose per group a sequence is a group:
        padding takes no slots, and the capacity is that of the sequence's own length.
      shared_expert_gate: the shared expert's output is multiplied by sigmoid(x g), with g a
        parameter `shared_expert_gate/kernel` `[d, 1]` (Qwen2-MoE). A conversion starts it at zero:
        the factor is then 1/2 for every token.
      aux_loss: 'per_layer': a load-balancing loss for each group of GROUP_SIZE tokens of each
        layer, averaged. 'joint': one for all tokens of all layers together, as transformers
        computes it (`moe.losses.joint_load_balancing_loss`); what layers prefer may then cancel,
        and no factor turns one into the other. For routers with such a loss alone.
      capacity_rounding: how capacity factor * S / E becomes a number of slots: 'round' (half to
        even, as Flaxformer and V-MoE's soft_moe configurations), 'ceil' (V-MoE's default) or
        'floor'. Of small groups it decides the effective factor, which is logged: 2 * 49 / 32 slots
        are 3 or 4, experts per token 1.96 or 2.61.
      capacity_multiple: slots are filled up to a multiple of it (V-MoE's default is 4).
      importance_loss_factor: weight of V-MoE's importance loss (`moe.losses.importance_loss`),
        averaged over all MoE layers: V-MoE's is 0.005, beside an `aux_loss_factor` of 0.
      load_loss_factor: weight of V-MoE's load loss (`moe.losses.load_loss`), likewise; it is 0 in
        evaluation, which has no noise.
      fresh_experts: experts that are made from scratch are 'different', or all 'equal' to the first
        of them (every configuration of V-MoE; the router alone then tells them apart).

    Raises:
      ValueError: a number out of range, or an unknown dispatch.
    """

    num_experts: checks.Experts = 32
    expert_mlp_dim: checks.Size | None = None
    shared_expert_mlp_dim: checks.Size | None = None
    extra_mlp: bool = False
    group_size: checks.Count = 4096
    train_expert_capacity_factor: CapacityFactor = 2.0
    eval_expert_capacity_factor: CapacityFactor = 2.0
    min_expert_capacity: checks.Size = 4
    aux_loss_factor: checks.NotNegative = 0.01
    router_z_loss_factor: checks.NotNegative = 0.0
    expert_dropout_rate: checks.BelowOne | None = None
    dispatch: Dispatch = "auto"
    ignore_padding_tokens: bool | None = None
    t5x_mode: bool = False
    num_expert_replicas: checks.Size = 1
    inference_routing: Literal["independent", "grouped"] = "independent"
    min_inference_capacity: checks.Size = 1
    independent: bool = False
    shared_expert_gate: bool = dataclasses.field(default=False, metadata=checks.ADDED)
    aux_loss: Literal["per_layer", "joint"] = dataclasses.field(
        default="per_layer", metadata=checks.ADDED
    )
    capacity_rounding: CapacityRounding = dataclasses.field(default="round", metadata=checks.ADDED)
    capacity_multiple: checks.Size = dataclasses.field(default=1, metadata=checks.ADDED)
    importance_loss_factor: checks.NotNegative = dataclasses.field(
        default=0.0, metadata=checks.ADDED
    )
    load_loss_factor: checks.NotNegative = dataclasses.field(default=0.0, metadata=checks.ADDED)
    fresh_experts: Literal["different", "equal"] = dataclasses.field(
        default="different", metadata=checks.ADDED
    )

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.dispatch not in DISPATCHES:
            raise ValueError(
                f"dispatch must be one of {', '.join(map(repr, DISPATCHES))}, got {self.dispatch!r}"
            )
        if self.shared_expert_gate and self.shared_expert_mlp_dim is None:
            raise ValueError(
                "shared_expert_gate=True without a shared expert: set shared_expert_mlp_dim"
                " (SHARED_EXPERT_MLP_DIM) to its hidden size, or shared_expert_gate=False"
            )
        if self.t5x_mode and (self.capacity_rounding, self.capacity_multiple) != ("round", 1):
            raise ValueError(
                f"t5x_mode follows Flaxformer, which rounds capacities to the nearest number: leave"
                f" capacity_rounding={self.capacity_rounding!r} at 'round' and"
                f" capacity_multiple={self.capacity_multiple} at 1, or set t5x_mode=False"
            )

    def check_routers(self, routers: Sequence[Router]) -> None:
        """Checks the routers of a model's MoE layers against these settings.

        Raises:
          ValueError: they do not fit each other.
        """
        dropless = any(router.has_room_for_all for router in routers)
        if self.dispatch not in ("auto", "gather", "one_hot") and not dropless:
            who = "the router has" if len(routers) == 1 else "both routers have"
            raise ValueError(
                f"dispatch={self.dispatch!r} moves the tokens of dropless routers, and {who}"
                " a capacity: leave dispatch at 'auto', or use DroplessTopK()"
            )
        for router in routers:
            if self.aux_loss == "joint" and not router.has_balance_loss:
                raise ValueError(
                    f"aux_loss='joint' is a load-balancing loss, and {type(router).__name__}"
                    " balances without one: leave aux_loss at 'per_layer'"
                )
            if self.t5x_mode and not router.in_flaxformer:
                raise ValueError(
                    f"t5x_mode follows Flaxformer, which has no {router}: use ExpertsChoose,"
                    " TokensChoose or SwitchTop1 with a capacity, or set t5x_mode=False"
                )
            self._check_softmax_losses(router)
            router.check(self.num_experts)

    def _check_softmax_losses(self, router: Router) -> None:
        """Raises ValueError where a router cannot have the losses of V-MoE that are asked for."""
        asked = [
            name
            for name in ("importance_loss_factor", "load_loss_factor")
            if getattr(self, name) > 0
        ]
        if asked and not router.chooses_by_softmax:
            raise ValueError(
                f"{asked[0]}={getattr(self, asked[0])} weighs a loss of tokens that choose by a"
                f" softmax, and {type(router).__name__} is no such router: set it to 0, or use"
                " TokensChoose()"
            )
        if self.load_loss_factor > 0 and not router.logit_noise:
            raise ValueError(
                f"load_loss_factor={self.load_loss_factor} weighs the probability of being chosen"
                f" under noise, and the {type(router).__name__} has none: give it a noise_std"
                " (V-MoE's is 1.0), or set load_loss_factor to 0"
            )

    @property
    def like_dense(self) -> Self:
        """These settings where experts that are copies give what the dense model does: combine
        weights sum to 1 where the router can have it, every token has room in evaluation, and no
        expert is shared.
        """
        routers: dict[str, Any] = {
            field.name: router.renormalized() or router
            for field in dataclasses.fields(self)
            if isinstance(router := getattr(self, field.name), Router)
        }
        return dataclasses.replace(
            self,
            shared_expert_mlp_dim=None,
            shared_expert_gate=False,
            eval_expert_capacity_factor=float(self.num_experts),
            **routers,
        )

    def capacity_factor(self, *, train: bool) -> float:
        """The capacity factor of training or of evaluation."""
        return self.train_expert_capacity_factor if train else self.eval_expert_capacity_factor
