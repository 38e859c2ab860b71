"""Reading compiled programs: loops, collectives and their groups, products, bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opensora_jax.planning import hlo

TRIPS, D, ROWS = 5, 16, 8
F32 = 4


@functools.cache
def program():
    """A loop of known products and collectives on a (4, 2) mesh."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P("x"), check_vma=False
    )
    def run(weights, x):
        def body(x, part):
            w = jax.lax.all_gather(part, "x", tiled=True)  # (D, D) from (D / 4, D)
            x = jax.lax.psum(jnp.tanh(x @ w), "y")
            x = jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.all_to_all(x, "x", 0, 1, tiled=True).reshape(x.shape), None

        x, _ = jax.lax.scan(body, x, weights)
        return jnp.tile(jax.lax.psum_scatter(x, "y", tiled=True), (2, 1))

    def shape(*dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

    compiled = (
        jax.jit(run)
        .lower(shape(TRIPS, D, D, spec=P(None, "x")), shape(4 * ROWS, D, spec=P("x")))
        .compile()
    )
    return hlo.Program(compiled.as_text(), 8), compiled


def test_collectives_are_counted_as_often_as_they_run():
    found = {c.kind: c for c in program()[0].collectives()}
    assert {kind: c.count for kind, c in found.items()} == {
        "all-gather": TRIPS,
        "all-reduce": TRIPS,
        "collective-permute": TRIPS,
        "all-to-all": TRIPS,
        "reduce-scatter": 1,
    }
    assert found["all-gather"].bytes == D * D * F32
    for kind in ("all-reduce", "collective-permute", "all-to-all", "reduce-scatter"):
        assert found[kind].bytes == ROWS * D * F32
    over_x, over_y = [[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found["all-gather"].groups.tolist() == over_x
    assert found["all-to-all"].groups.tolist() == over_x
    assert found["all-reduce"].groups.tolist() == over_y
    assert found["reduce-scatter"].groups.tolist() == over_y
    assert [0, 2] in found["collective-permute"].groups.tolist()


def test_products_in_loops():
    found, compiled = program()
    product = 2 * ROWS * D * D
    assert found.matmul_flops() == TRIPS * product
    assert found.matmul_flops(loops=False) == product
    # The compiler counts elementwise operations as well, and takes a loop's body once.
    assert product <= compiled.cost_analysis()["flops"] < 2 * product
    assert found.unknown_loops == []


def test_bytes():
    n = 256

    @jax.jit
    def run(table, x):
        def body(x, row):
            return x @ row, None

        return jax.lax.scan(body, x, table)[0]

    table = jax.ShapeDtypeStruct((TRIPS, n, n), jnp.float32)
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    compiled = run.lower(table, x).compile()
    # Each trip reads one matrix of the table, not all, and x, and writes x; copies come on top.
    least = TRIPS * 3 * n * n * F32
    assert least <= hlo.Program(compiled.as_text(), 1).hbm_bytes() < 2.5 * least


def tpu(body, condition=""):
    """A program as the TPU compiler writes it: names without types, memory spaces, tilings."""
    return hlo.Program(
        f"""HloModule jit_step, is_scheduled=true

%condition (p.1: (s32[], bf16[64,48])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(12), metadata={{op_name="jit(step)/while"}}
  %p.1 = (s32[]{{:T(128)}}, bf16[64,48]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %get-tuple-element.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  ROOT %compare.1 = pred[]{{:T(512)}} compare({condition}), direction=LT
}}

%fused.1 (p.2: bf16[64,48]) -> (bf16[64,48], bf16[64,768], u32[]) {{
  %p.2 = bf16[64,48]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.1 = bf16[64,768]{{0,1:T(8,128)(2,1)S(1)}} all-gather(%p.2), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=16] {{'axis_1'}}, dimensions={{1}}, frontend_attributes={{chain_id="0"}}
  ROOT %custom-call.1 = (bf16[64,48]{{1,0:T(8,128)(2,1)}}, bf16[64,768]{{0,1:T(8,128)(2,1)S(1)}}, /*index=2*/u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%fused.2 (p.3: bf16[64,48]) -> bf16[64,768] {{
  %p.3 = bf16[64,48]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.2 = bf16[64,768]{{0,1:T(8,128)(2,1)S(1)}} all-gather(%p.3), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=16] {{'axis_1'}}, dimensions={{1}}, frontend_attributes={{chain_id="0"}}
  ROOT %custom-call.2 = bf16[64,768]{{0,1:T(8,128)(2,1)S(1)}} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.1 (input.1: bf16[64,768]) -> bf16[4,768] {{
  %input.1 = bf16[64,768]{{1,0:T(8,128)(2,1)}} parameter(0)
  %constant.2 = s32[]{{:T(128)}} constant(0)
  %all-reduce.1 = bf16[64,768]{{1,0:T(8,128)(2,1)}} all-reduce(%input.1), channel_id=8, replica_groups=[2,16]<=[16,2]T(1,0), use_global_device_ids=true, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[4,768]{{1,0:T(8,128)(2,1)}} dynamic-slice(%all-reduce.1, %constant.2, %constant.2), dynamic_slice_sizes={{4,768}}
}}

%body (p.4: (s32[], bf16[64,48])) -> (s32[], bf16[64,48]) {{
  %p.4 = (s32[]{{:T(128)}}, bf16[64,48]{{1,0:T(8,128)(2,1)S(1)}}) parameter(0)
  %get-tuple-element.2 = bf16[64,48]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%p.4), index=1
  {body}
  ROOT %tuple.1 = (s32[]{{:T(128)}}, bf16[64,48]{{1,0:T(8,128)(2,1)S(1)}}) tuple(%p.4, %get-tuple-element.2)
}}

ENTRY %main.1 (p.5: bf16[64,48]) -> bf16[64,48] {{
  %p.5 = bf16[64,48]{{1,0:T(8,128)(2,1)}} parameter(0)
  %while.1 = (s32[]{{:T(128)}}, bf16[64,48]{{1,0:T(8,128)(2,1)S(1)}}) while(%p.5), condition=%condition, body=%body, metadata={{op_name="jit(step)/while"}}
  ROOT %get-tuple-element.3 = bf16[64,48]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.1), index=1
}}
""",  # noqa: E501
        32,
    )


SCAN = "%get-tuple-element.1, %constant.1"


def test_a_tpu_s_scan_and_its_collectives():
    found = tpu(
        """
  %fusion.1 = (bf16[64,48]{1,0:T(8,128)(2,1)}, bf16[64,768]{0,1:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:S(2)}) fusion(%get-tuple-element.2), kind=kOutput, calls=%fused.1
  %fusion.2 = bf16[64,768]{0,1:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2), kind=kOutput, calls=%fused.2
  %fusion.3 = bf16[4,768]{1,0:T(8,128)(2,1)} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
""",  # noqa: E501
        SCAN,
    )
    gather, scatter = found.collectives()
    assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 12, 2 * 64 * 768)
    assert gather.groups.tolist() == np.arange(32).reshape(2, 16).tolist()
    assert (scatter.kind, scatter.count, scatter.bytes) == ("reduce-scatter", 12, 2 * 64 * 768)
    assert scatter.groups.tolist() == np.arange(32).reshape(16, 2).T.tolist()


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    body = "%convolution.1 = bf16[64,64] convolution(%get-tuple-element.2, %get-tuple-element.2), dim_labels=bf_oi->bf"  # noqa: E501
    found = tpu(body, "%get-tuple-element.1, %get-tuple-element.1")
    assert found.unknown_loops == ["while.1"]
    assert found.matmul_flops() == found.matmul_flops(loops=False) == 2 * 64 * 64 * 48


def test_groups_with_devices_in_another_order():
    body = "%all-gather.3 = bf16[64,768] all-gather(%get-tuple-element.2), replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=2], device_ids=([2,16]T(1,0)) {'axis_0'}, dimensions={1}"  # noqa: E501
    (gather,) = tpu(body, SCAN).collectives()
    assert gather.groups.tolist() == np.arange(32).reshape(2, 16).tolist()


def test_a_gather_that_is_a_sum_of_parts():
    body = """%zero = bf16[64,768] broadcast(%get-tuple-element.2)
  %i = s32[] constant(0)
  %part = bf16[64,768] dynamic-update-slice(%zero, %get-tuple-element.2, %i, %i)
  %moved = bf16[64,768] copy(%part)
  %sum = bf16[64,768] all-reduce(%OPERAND), replica_groups={{0,1},{2,3}}, to_apply=%add"""
    for operand, gathers in (("moved", True), ("zero", False)):
        (found,) = tpu(body.replace("OPERAND", operand), SCAN).collectives()
        assert found.gathers == gathers


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dkv", 4), ("dq", 3)])
def test_products_in_attention_kernels(kernel, products):
    body = f"""%t = s8[1,32,1] broadcast(%get-tuple-element.2)
  %q = bf16[4,24,512,128] broadcast(%get-tuple-element.2)
  %k = bf16[4,24,256,128] broadcast(%get-tuple-element.2)
  %splash_mha_{kernel}_no_residuals.1 = bf16[4,24,512,128] custom-call(%t, %t, %q, %k, %k)"""
    flops = 2 * 4 * 24 * 512 * 256 * 128
    assert tpu(body, SCAN).attention_flops() == 12 * products * flops


def test_an_operand_given_twice_is_read_once():
    x = "%x = bf16[64,48] broadcast(%get-tuple-element.2)"
    square = f"{x}\n  %square = bf16[64,48] multiply(%x, %x)"
    added = tpu(square, SCAN).hbm_bytes() - tpu(x, SCAN).hbm_bytes()
    assert added == 12 * 2 * 64 * 48 * 2  # read and written, two bytes each, in twelve turns


def test_of_a_stack_that_a_fusion_inside_a_fusion_slices_a_slice_is_read():
    """As a TPU fuses a block's input, taken from the stack of all, into its first product."""
    text = """HloModule m

%inner (stack: bf16[28,64,48], i: s32[]) -> bf16[64,48] {
  %stack = bf16[28,64,48] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,48] dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,48}
  ROOT %x = bf16[64,48] bitcast(%slice)
}

%outer (weight: bf16[48,32], stack.1: bf16[28,64,48], i.1: s32[]) -> bf16[64,32] {
  %stack.1 = bf16[28,64,48] parameter(1)
  %weight = bf16[48,32] parameter(0)
  %i.1 = s32[] parameter(2)
  %fusion.1 = bf16[64,48] fusion(%stack.1, %i.1), kind=kLoop, calls=%inner
  ROOT %product = bf16[64,32] convolution(%fusion.1, %weight), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[28,64,48], w: bf16[48,32], n: s32[]) -> bf16[64,32] {
  %p = bf16[28,64,48] parameter(0)
  %w = bf16[48,32] parameter(1)
  %n = s32[] parameter(2)
  ROOT %fusion.2 = bf16[64,32] fusion(%w, %p, %n), kind=kOutput, calls=%outer
}
"""
    expected = 2 * (64 * 48 + 48 * 32 + 64 * 32) + 4
    assert hlo.Program(text, 1).hbm_bytes() == expected


@pytest.mark.parametrize(
    ("out", "lhs", "rhs", "attributes", "flops"),
    [
        # A product of matrices, and of 64 x 12 pairs of them, as windows full of padding.
        ("64,32", "64,48", "48,32", "dim_labels=bf_io->bf", 2 * 64 * 32 * 48),
        (
            *("8,3,128,16", "8,128,3,64", "8,16,3,64"),
            "window={size=8x3 stride=7x2 lhs_dilate=8x3}, dim_labels=0b1f_0o1i->01bf",
            2 * 8 * 3 * 128 * 16 * 64,
        ),
        # A convolution of kernel 3 with padding: two of 3 x 10 positions are outside.
        (
            *("4,10,5", "4,10,6", "3,6,5"),
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 4 * 5 * 6 * 28,
        ),
    ],
)
def test_products_as_convolutions(out, lhs, rhs, attributes, flops):
    body = f"""%x = bf16[{lhs}] broadcast(%get-tuple-element.2)
  %y = bf16[{rhs}] broadcast(%get-tuple-element.2)
  %convolution.1 = bf16[{out}] convolution(%x, %y), {attributes}"""
    assert tpu(body, SCAN).matmul_flops() == 12 * flops
