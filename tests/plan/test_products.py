"""The reader of matrix products: programs whose FLOPs are known, compiled here, and every textual form that XLA is
known to write."""

import jax
import jax.numpy as jnp
import pytest

from sparsejax.plan.products import dot_flops, read_dots


def compiled(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_matrix_product():
    (dot,) = read_dots(compiled(jnp.matmul, (32, 64), (64, 48)))
    assert (dot.once, dot.times, dot.flops) == (2 * 32 * 48 * 64, 1, 2 * 32 * 48 * 64)


@pytest.mark.parametrize(
    ("equation", "left", "right", "multiply_adds"),
    [
        ("bij,bjk->bik", (4, 32, 16), (4, 16, 24), 4 * 32 * 16 * 24),
        ("btnh,bsnh->bnts", (2, 16, 4, 32), (2, 16, 4, 32), 2 * 4 * 16 * 16 * 32),
        ("btnh,nhd->btd", (2, 16, 4, 8), (4, 8, 24), 2 * 16 * 24 * 4 * 8),
        ("ij,kj->ki", (32, 16), (24, 16), 32 * 16 * 24),
    ],
)
def test_einsums(equation, left, right, multiply_adds):
    assert dot_flops(compiled(lambda a, b: jnp.einsum(equation, a, b), left, right)) == 2 * multiply_adds


def test_a_loop_counts_as_often_as_it_runs():
    text = compiled(scanned, (16, 32), (7, 32, 32))
    (dot,) = read_dots(text)
    assert (dot.times, dot.once, dot.loop_unknown) == (7, 2 * 16 * 32 * 32, False)


def test_loops_in_loops():
    def outer(x, weights):
        return jax.lax.scan(lambda x, _: (scanned(x, weights), None), x, length=5)[0]

    assert dot_flops(compiled(outer, (16, 32), (7, 32, 32))) == 5 * 7 * 2 * 16 * 32 * 32


def test_a_backward_pass_costs_twice_the_forward_pass():
    def loss(x, weights):
        return scanned(x, weights).sum()

    once = 7 * 2 * 16 * 32 * 32
    assert dot_flops(compiled(jax.grad(loss, argnums=(0, 1)), (16, 32), (7, 32, 32))) == 3 * once


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.tanh(x @ w), x)

    (dot,) = read_dots(compiled(until, (16, 32), (32, 32)))
    assert (dot.times, dot.loop_unknown) == (1, True)


def test_a_conditional_costs_its_costliest_branch():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    assert dot_flops(compiled(either, (16, 32), (32, 32))) == 2 * 2 * 16 * 32 * 32


def test_named_scopes_are_kept():
    def scopes(x, w):
        with jax.named_scope("router"):
            return x @ w

    (dot,) = read_dots(compiled(scopes, (16, 32), (32, 32)))
    assert "/router/" in dot.scope


def test_a_program_without_products():
    assert dot_flops(compiled(jnp.tanh, (16, 32))) == 0


MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={{(f32[8,16]{{1,0}})->f32[8,4]{{1,0}}}}

%body (arg: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {{
  %arg = (s32[], f32[8,16]{{1,0}}, /*index=2*/f32[16,4]{{1,0}}) parameter(0)
  %a = f32[8,16]{{1,0}} get-tuple-element(%arg), index=1
  %b = f32[16,4]{{1,0}} get-tuple-element(%arg), index=2
  {product}
  ROOT %t = (s32[], f32[8,16]{{1,0}}, f32[16,4]{{1,0}}) tuple(%i, %a, %b)
}}

ENTRY %main (x: f32[8,16]) -> f32[8,4] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %loop = (s32[], f32[8,16]{{1,0:T(8,128)}}, f32[16,4]{{1,0}}) while(%init), condition=%cond, body=%body, {trips}
}}
"""
PRODUCTS = {
    "names": "%dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "typed operands": "%dot.1 = f32[8,4]{1,0} dot(f32[8,16]{1,0} %a, f32[16,4]{1,0} %b), lhs_contracting_dims={1}",
    "tiled layouts": "%dot.1 = f32[8,4]{1,0:T(8,128)} dot(f32[8,16]{1,0:T(8,128)(2,1)} %a, f32[16,4]{0,1:T(8,128)} %b),"
    " lhs_contracting_dims={1}",
    "root": "ROOT %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "oneDNN": '%m = f32[8,4]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul", backend_config={}',
}
TRIPS = {
    "json": 'backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"3"}}',
    "escaped json": 'backend_config="{\\"known_trip_count\\":{\\"n\\":\\"3\\"}}"',
    "attribute": "known_trip_count={n=3}",
}


@pytest.mark.parametrize("trips", TRIPS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_textual_forms(product, trips):
    text = MODULE.format(product=PRODUCTS[product], trips=TRIPS[trips])
    assert dot_flops(text) == 3 * 2 * 8 * 16 * 4


def test_batched_onednn_products_with_either_side_transposed():
    text = """
ENTRY %main () -> f32[2,3,8,4] {
  %a = f32[2,3,16,8]{3,2,1,0} parameter(0)
  %b = f32[2,3,4,16]{3,2,1,0} parameter(1)
  ROOT %m = f32[2,3,8,4]{3,2,1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"
}
"""
    assert dot_flops(text) == 2 * 2 * 3 * 8 * 16 * 4


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        dot_flops("module @jit_f {}")
    with pytest.raises(ValueError, match=r"dot\.1: the shape of its operand nowhere is not in the text"):
        dot_flops(MODULE.format(product="%dot.1 = f32[8,4]{1,0} dot(%nowhere, %b)", trips=TRIPS["json"]))


def convolution(result, operands, attributes):
    """A program of one convolution, as the TPU compiler writes products; `operands`: their shapes."""
    lhs, rhs = operands
    lines = [
        f"%a = bf16[{lhs}]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)",
        f"%b = bf16[{rhs}]{{1,0:T(8,128)(2,1)}} parameter(1)",
        f"ROOT %c = bf16[{result}]{{1,0:T(8,128)(2,1)}} convolution(%a, %b), {attributes}",
    ]
    return "\n".join(["HloModule m", "", "ENTRY %main () -> bf16[] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("result", "operands", "attributes", "multiply_adds"),
    [
        ("512,256", ("512,1024", "1024,256"), "dim_labels=bf_io->bf", 512 * 1024 * 256),
        ("512,256", ("1024,512", "256,1024"), "dim_labels=fb_oi->bf", 512 * 1024 * 256),
        # A contraction over two dimensions: heads are the window.
        ("512,256,1", ("512,4,64", "4,64,256"), "window={size=4}, dim_labels=b0f_0io->bf0", 512 * 4 * 64 * 256),
        # … and turned round: each of the 4 places of the output meets one of the window.
        (
            "512,4,64",
            ("512,256,1", "4,64,256"),
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            512 * 256 * 4 * 64,
        ),
        # A batch of 2 products.
        (
            "2,640,2048",
            ("2,640,512", "2,512,2048"),
            "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf",
            2 * 640 * 512 * 2048,
        ),
        # A batch of 3, by stride.
        (
            "3,64,16",
            ("3,64,32", "3,32,16"),
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * 64 * 32 * 16,
        ),
        # Real convolutions: with padding, with groups of features, in two dimensions.
        ("1,8,16", ("1,8,4", "3,4,16"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (8 * 3 - 2) * 4 * 16),
        ("1,8,16", ("1,8,4", "1,1,16"), "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=4", 8 * 16),
        ("1,6,6,2", ("1,8,8,4", "3,3,4,2"), "window={size=3x3}, dim_labels=b01f_01io->b01f", 36 * 9 * 4 * 2),
    ],
)
def test_products_as_convolutions(result, operands, attributes, multiply_adds):
    assert dot_flops(convolution(result, operands, attributes)) == 2 * multiply_adds


def kernel(name, attributes, config="{}"):
    """A Pallas kernel in a program, with its attributes over several lines."""
    scope = f"jit(step)/attention/shard_map/{name}/pallas_call"
    call = f'custom-call(%a), custom_call_target="tpu_custom_call", {attributes}'
    metadata = f'metadata={{op_name="{scope}" stack_frame_id=5}}, backend_config={{"custom_call_config":{config}}}'
    return "\n".join(
        [
            "HloModule m",
            "ENTRY %main () -> f32[] {",
            f"  ROOT %k = (bf16[8,512,64]{{2,1,0}}) {call}, frontend_attributes={{kernel_metadata={{",
            '"xprof_metadata":"{\\"block_q_dq\\": 128, \\"block_kv_dq\\": 128}"',
            f"}}}}, {metadata}",
            "}",
        ]
    )


@pytest.mark.parametrize(("name", "products"), [("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)])
def test_flash_attention_costs_the_blocks_that_are_not_masked(name, products):
    """Of 4 × 4 blocks of 128 tokens 10 are causal; 8 heads of 64."""
    shapes = "operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[2,4,512,64]{3,2,1,0}, bf16[2,4,512,64]{3,2,1,0}}"
    (dot,) = read_dots(kernel(f"{name}_segmented_residuals", shapes))
    assert dot.flops == products * 10 * 2 * 8 * 128 * 128 * 64
    assert "shard_map" in dot.scope


def test_a_kernel_that_tells_its_cost_is_believed():
    config = '{"body":"TUz+/=","cost_estimate":{"flops":"17179869184","transcendentals":"0"}}'
    assert dot_flops(kernel("gmm", "operand_layout_constraints={bf16[8,16]{1,0}}", config)) == 17179869184


def test_an_unknown_kernel_costs_nothing_that_is_known():
    assert dot_flops(kernel("mine", "operand_layout_constraints={bf16[8,16]{1,0}}")) == 0


def test_products_of_cublas():
    config = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}'
    text = f"""
ENTRY %main () -> f32[2,8,4] {{
  %a = f32[2,8,16]{{2,1,0}} parameter(0)
  %b = f32[2,16,4]{{2,1,0}} parameter(1)
  ROOT %m = (f32[2,8,4]{{2,1,0}}, s8[1024]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", {config}
}}
"""
    assert dot_flops(text) == 2 * 2 * 8 * 16 * 4
