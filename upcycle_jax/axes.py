"""Logical axis names of parameters and activations.

Every parameter and every constrained activation names its axes with these constants; `partitioning`
alone decides which mesh axis each one is split over. Names are T5X's and Flaxformer's where the
axis is the same.
"""

# Parameters.
VOCAB = "vocab"
EMBED = "embed"
MLP = "mlp"
EXPERT = "expert"
EXPERT_MLP = "expert_mlp"
HEADS = "heads"
JOINED_KV = "joined_kv"  # heads * head_dim, the flattened output axis of an attention projection
RELPOS_BUCKETS = "relpos_buckets"
POSITIONS = "positions"  # of the patches of an image, row by row
CLASSES = "classes"  # of images: their number may be any
UNMODELED = "unmodeled"  # never split: the expert axis of a router kernel

# Activations.
BATCH = "batch"
LENGTH = "length"
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_MLP = "activation_mlp"
ACTIVATION_HEADS = "activation_heads"
ACTIVATION_VOCAB = "activation_vocab"
EXPERT_GROUP = "expert_group"  # token groups before dispatch: split like the batch
EXPERT_REPLICA_GROUP = (  # token groups after dispatch: split over data only, experts over 'expert'
    "expert_replica_group"
)
ACTIVATION_EXPERT = "activation_expert"
ACTIVATION_EXPERT_MLP = "activation_expert_mlp"
