"""FLOPs of small programs by hand, and of whole losses as XLA counts what they are lowered to."""

import jax
import jax.numpy as jnp
import pytest

from upcycle_jax import trees
from upcycle_jax.costs import flops, loss_program
from upcycle_jax.costs.flops import Value
from upcycle_jax.moe.routing import (
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.partitioning import Partitioner

MESH = {"data": 4, "expert": 1, "model": 2}
WHOLE = ((), ())
ROWS, COLUMNS = (("data",), ()), ((), ("model",))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def count(function, *arguments, split=(), gradients=()):
    """Work of a function of arrays of two dimensions; `gradients` are indices of arguments."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    given = [*split, *[((),) * len(leaf.shape) for leaf in arguments[len(split) :]]]
    values = [Value(one, i in gradients) for i, one in enumerate(given)]
    return flops.count(jaxpr, values, MESH)[0]


def test_products_and_elementwise_operations():
    work = count(lambda x, k: jnp.sum(jnp.tanh(x @ k) * 2.0 + 1.0), shape(8, 16), shape(16, 4))
    # tanh is free; times, plus, and the sum of 32 elements: 31 additions.
    assert work.products == 2 * 8 * 16 * 4 and work.gradient_products == 0
    assert work.device == work.products + 8 * 4 + 8 * 4 + 31


def test_a_product_with_a_vector_of_ones_is_a_sum():
    work = count(lambda x: jnp.dot(jnp.ones(8), x), shape(8, 16))
    assert work.products == work.gradient_products == 0
    assert work.device == 2 * 8 * 16  # as XLA counts the product


def test_products_of_gradients_are_told_apart():
    def backward(x, k, gradient):
        hidden = x @ k  # computed again: 2 * 8 * 16 * 4
        return (gradient * hidden) @ k.T  # 2 * 8 * 4 * 16

    work = count(backward, shape(8, 16), shape(16, 4), shape(8, 4), gradients=[2])
    assert work.products == work.gradient_products == 2 * 8 * 16 * 4


def test_loops_count_as_often_as_they_run():
    def looped(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    work = count(looped, shape(8, 16), shape(5, 16, 16))
    assert work.products == work.device == 5 * 2 * 8 * 16 * 16


def test_of_branches_the_cheapest_counts():
    def either(x, k):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ k, lambda: (x @ k) @ k)

    assert count(either, shape(8, 16), shape(16, 16)).products == 2 * 8 * 16 * 16


def test_what_is_computed_again_under_checkpoint():
    def loss(k, x):
        return jnp.sum(jax.checkpoint(lambda k: jnp.tanh(x @ k) @ k)(k))

    def backward(k, x, gradient):
        return jax.vjp(lambda k: loss(k, x), k)[1](gradient)

    work = count(backward, shape(16, 16), shape(8, 16), shape(), gradients=[2])
    # Forward two products. Backward: the first again; of it the gradient to the kernel, of the
    # second both.
    product = 2 * 8 * 16 * 16
    assert (work.products, work.gradient_products) == ((2 + 1) * product, 3 * product)
    # tanh, which the gradient of the second kernel needs, and 1 - tanh, which its own does.
    assert work.recomputed_bytes == 2 * 8 * 16 * 4


def test_groups_of_rows_count_each_row_once():
    def grouped(x, kernels, sizes):
        return jax.lax.ragged_dot(x, kernels, sizes)

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    rows = (("data",), ())
    work = count(grouped, shape(64, 8), shape(4, 8, 16), sizes, split=[rows])
    assert work.products == 2 * 64 * 8 * 16
    assert work.device == work.products / 4

    def gradient(x, kernels, sizes):
        return jax.grad(lambda k: jnp.sum(grouped(x, k, sizes)))(kernels)

    # Forward, and each group's rows contracted.
    work = count(gradient, shape(64, 8), shape(4, 8, 16), sizes)
    assert work.products == 2 * 2 * 64 * 8 * 16


def test_a_convolution():
    def patches(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    split = [(("data",), (), (), ())]
    work = count(patches, shape(8, 16, 16, 3), shape(4, 4, 3, 32), split=split)
    # 4 x 4 patches of each of 8 images, 32 features, each a sum over 4 * 4 * 3.
    assert work.products == 8 * 16 * 32 * 2 * 48
    assert work.device == work.products / 4


def test_one_device_does_its_share():
    """Rows over four devices, hidden units over two, as in a dense MLP."""

    def mlp(x, wi, wo):
        return jax.nn.relu(x @ wi) @ wo

    work = count(
        mlp, shape(32, 16), shape(16, 64), shape(64, 16), split=[ROWS, COLUMNS, (("model",), ())]
    )
    assert work.products == 2 * 2 * 32 * 16 * 64
    assert work.device == work.products / 8 + 32 * 64 / 8  # relu takes the maximum

    # A kernel's gradient is a sum over rows: each device has it whole but for columns.
    work = count(
        lambda x, g: (x.T @ g) * 2.0,
        shape(32, 16),
        shape(32, 64),
        split=[ROWS, (("data",), ("model",))],
    )
    assert work.device == 2 * 32 * 16 * 64 / 8 + 16 * 64 / 2


def test_what_does_not_depend_on_the_batch_is_repeated():
    work = count(lambda table: table @ table.T, shape(8, 16), split=[WHOLE])
    assert work.device == work.products


ONE_LAYER = {
    "emb_dim": 32,
    "head_dim": 16,
    "mlp_dim": 128,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
"""A stack of one layer has the operations of any number of them."""
MOE = {
    "num_experts": 4,
    "group_size": 32,
    "encoder_sparse_layout": (0,),
    "decoder_sparse_layout": (0,),
}


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        ({}, {}),
        ({"mlp_activations": ("gelu_exact", "silu", "relu"), "logits_via_embedding": True}, {}),
        ({}, {**MOE, "encoder_router": ExpertsChoose(), "decoder_router": TokensChoose()}),
        ({}, {**MOE, "encoder_router": SwitchTop1(), "decoder_router": SigmoidTopK()}),
        ({}, {**MOE, "encoder_router": SoftMoe(2), "decoder_router": LossFreeTopK()}),
        ({}, {**MOE, "encoder_router": HashTop1(), "decoder_router": HashTop1()}),
    ],
    ids=["dense", "other_activations_tied", "default", "switch_sigmoid", "soft_loss_free", "hash"],
)
def test_a_loss_and_its_gradient_as_xla_counts_them(model, moe, tiny):
    """Before XLA optimises, so that nothing is compiled; `test_against_xla` has compiled steps."""
    model = tiny(model=ONE_LAYER | model, **moe)
    lengths = {"inputs": 32, "targets": 16}
    counted = loss_program.count(
        loss_program.trace(model, 4, lengths), Partitioner(devices=(jax.devices()[0],))
    )
    params = trees.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in model.param_specs().items()
        }
    )

    def loss(params, batch):
        return model.loss_fn(params, batch, None, denominator=jnp.float32(1.0))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = step.lower(params, model.input_specs(4, lengths)).cost_analysis()
    assert counted.forward.device + counted.backward.device == pytest.approx(
        lowered["flops"], rel=0.005
    )
