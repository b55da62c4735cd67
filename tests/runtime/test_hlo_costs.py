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
