// The operations of mlir-aie that bstf's designs use, for `mlir-opt --irdl-file`: operands, results, attributes and regions.
// Made for MLIR 19. IRDL has no optional attributes and no terminators: of optional attributes nothing is said (mem_bank,
// packet, static_sizes, static_strides), and terminators stand in a dialect of their own, `terminator`.

irdl.dialect @aie {
  irdl.attribute @packet_info {
    %type = irdl.base "#builtin.integer"
    %id = irdl.base "#builtin.integer"
    irdl.parameters(%type, %id)
  }
  irdl.operation @device {
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.string"
    irdl.attributes {"device" = %attribute0, "sym_name" = %attribute1}
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @tile {
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    irdl.attributes {"col" = %attribute0, "row" = %attribute1}
    %result0 = irdl.is index
    irdl.results(%result0)
  }
  irdl.operation @buffer {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.string"
    irdl.attributes {"address" = %attribute0, "sym_name" = %attribute1}
    %result0 = irdl.base "!builtin.memref"
    irdl.results(%result0)
  }
  irdl.operation @lock {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    %attribute2 = irdl.base "#builtin.string"
    irdl.attributes {"init" = %attribute0, "lockID" = %attribute1, "sym_name" = %attribute2}
    %result0 = irdl.is index
    irdl.results(%result0)
  }
  irdl.operation @flow {
    %operand0 = irdl.is index
    %operand1 = irdl.is index
    irdl.operands(%operand0, %operand1)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    %attribute2 = irdl.base "#builtin.integer"
    %attribute3 = irdl.base "#builtin.integer"
    irdl.attributes {"source_bundle" = %attribute0, "source_channel" = %attribute1, "dest_bundle" = %attribute2, "dest_channel" = %attribute3}
  }
  irdl.operation @packet_flow {
    %attribute0 = irdl.base "#builtin.integer"
    irdl.attributes {"ID" = %attribute0}
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @packet_source {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    irdl.attributes {"bundle" = %attribute0, "channel" = %attribute1}
  }
  irdl.operation @packet_dest {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    irdl.attributes {"bundle" = %attribute0, "channel" = %attribute1}
  }
  irdl.operation @mem {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %result0 = irdl.is index
    irdl.results(%result0)
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @memtile_dma {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %result0 = irdl.is index
    irdl.results(%result0)
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @shim_dma {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %result0 = irdl.is index
    irdl.results(%result0)
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @core {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.string"
    irdl.attributes {"link_with" = %attribute0}
    %result0 = irdl.is index
    irdl.results(%result0)
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @use_lock {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    irdl.attributes {"action" = %attribute0, "value" = %attribute1}
  }
  irdl.operation @dma_bd {
    %operand0 = irdl.base "!builtin.memref"
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    %attribute2 = irdl.base "#builtin.integer"
    irdl.attributes {"bd_id" = %attribute0, "static_len" = %attribute1, "static_offset" = %attribute2}
  }
  irdl.operation @runtime_sequence {
    %attribute0 = irdl.base "#builtin.string"
    irdl.attributes {"sym_name" = %attribute0}
    %region = irdl.region
    irdl.regions(%region)
  }
}
irdl.dialect @aiex {
  irdl.operation @configure {
    %attribute0 = irdl.base "#builtin.symbol_ref"
    irdl.attributes {"symbol" = %attribute0}
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @run {
    %operand0 = irdl.base "!builtin.memref"
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.symbol_ref"
    irdl.attributes {"runtime_sequence_symbol" = %attribute0}
  }
  irdl.operation @dma_configure_task {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
    %attribute0 = irdl.base "#builtin.integer"
    %attribute1 = irdl.base "#builtin.integer"
    %attribute2 = irdl.base "#builtin.integer"
    irdl.attributes {"channel" = %attribute0, "direction" = %attribute1, "issue_token" = %attribute2}
    %result0 = irdl.is index
    irdl.results(%result0)
    %region = irdl.region
    irdl.regions(%region)
  }
  irdl.operation @dma_start_task {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
  }
  irdl.operation @dma_await_task {
    %operand0 = irdl.is index
    irdl.operands(%operand0)
  }
}
