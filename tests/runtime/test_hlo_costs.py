"""Costs are read from a scheduled HLO module, on lines as libtpu's compiler writes them."""

from runtime.hlo_costs import read_costs

MODULE = """
ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %sum = f32[2,4]{1,0} all-reduce(%b), replica_groups={{0,1,2,3}}, to_apply=%add
  %iota = u8[8,8]{1,0} all-gather(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %named = u8[8,8]{1,0} all-gather(%c), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}
"""  # noqa: E501


def test_bytes_received():
    assert read_costs(MODULE).collective_bytes == {
        "collective-permute": 64,  # the result; its contexts are nothing
        "all-reduce": 2 * 32 * 3 // 4,
        "all-gather": 2 * 64 * 3 // 4,
    }


def test_a_fused_reduce_scatter_is_counted_as_one():
    """As libtpu 0.0.50 schedules it for dp=2, tp=4: 8 rows of 4 bfloat16, a quarter a chip."""
    costs = read_costs(
        """
%all-reduce-scatter.1.clone (input: bf16[1,8,4]) -> bf16[2,4] {
  %input = bf16[1,8,4]{2,1,0} parameter(0)
  %all-reduce.7 = bf16[8,4]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %slice = bf16[2,4]{1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={2,4}
}

ENTRY %main (x: bf16[1,8,4]) -> bf16[2,4] {
  %x = bf16[1,8,4]{2,1,0} parameter(0)
  ROOT %fusion = bf16[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
    )
    assert costs.collective_bytes == {"reduce-scatter": 8 * 4 * 2 * 3 // 4}
