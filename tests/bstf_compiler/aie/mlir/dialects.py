"""The operations of mlir-aie that designs use, as dialects of xDSL, with what each one needs by mlir-aie's definition
(AIEOps.td, AIEX.td), as far as the generic form says it.
"""

from __future__ import annotations

from xdsl.context import Context
from xdsl.dialects import arith, builtin, func, scf
from xdsl.dialects.builtin import (
    DenseArrayBase,
    IndexType,
    IntegerAttr,
    MemRefType,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    i1,
)
from xdsl.ir import Dialect, ParametrizedAttribute
from xdsl.irdl import (
    IRDLOperation,
    attr_def,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    param_def,
    region_def,
    result_def,
    successor_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.traits import HasParent, IsolatedFromAbove, IsTerminator, NoTerminator, SymbolOpInterface, SymbolTable
from xdsl.utils.exceptions import VerifyException


@irdl_attr_definition
class PacketInfo(ParametrizedAttribute):
    name = "aie.packet_info"
    type: IntegerAttr = param_def()
    id: IntegerAttr = param_def()


@irdl_op_definition
class Device(IRDLOperation):
    name = "aie.device"
    device = attr_def(IntegerAttr)
    sym_name = attr_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(
        HasParent(builtin.ModuleOp), IsolatedFromAbove(), SymbolTable(), SymbolOpInterface(), NoTerminator()
    )


@irdl_op_definition
class Tile(IRDLOperation):
    name = "aie.tile"
    col = attr_def(IntegerAttr)
    row = attr_def(IntegerAttr)
    result = result_def(IndexType)
    traits = traits_def(HasParent(Device))


@irdl_op_definition
class Buffer(IRDLOperation):
    name = "aie.buffer"
    tile = operand_def(IndexType)
    address = attr_def(IntegerAttr)
    mem_bank = opt_attr_def(IntegerAttr)
    sym_name = attr_def(SymbolNameConstraint())
    result = result_def(MemRefType)
    traits = traits_def(HasParent(Device), SymbolOpInterface())


@irdl_op_definition
class Lock(IRDLOperation):
    name = "aie.lock"
    tile = operand_def(IndexType)
    init = attr_def(IntegerAttr)
    lock_id = attr_def(IntegerAttr, attr_name="lockID")
    sym_name = attr_def(SymbolNameConstraint())
    result = result_def(IndexType)
    traits = traits_def(HasParent(Device), SymbolOpInterface())


@irdl_op_definition
class Flow(IRDLOperation):
    name = "aie.flow"
    source = operand_def(IndexType)
    dest = operand_def(IndexType)
    source_bundle = attr_def(IntegerAttr)
    source_channel = attr_def(IntegerAttr)
    dest_bundle = attr_def(IntegerAttr)
    dest_channel = attr_def(IntegerAttr)
    traits = traits_def(HasParent(Device))


@irdl_op_definition
class PacketFlow(IRDLOperation):
    name = "aie.packet_flow"
    id = attr_def(IntegerAttr, attr_name="ID")
    ports = region_def("single_block")
    traits = traits_def(HasParent(Device))


@irdl_op_definition
class PacketSource(IRDLOperation):
    name = "aie.packet_source"
    tile = operand_def(IndexType)
    bundle = attr_def(IntegerAttr)
    channel = attr_def(IntegerAttr)
    traits = traits_def(HasParent(PacketFlow))


@irdl_op_definition
class PacketDest(IRDLOperation):
    name = "aie.packet_dest"
    tile = operand_def(IndexType)
    bundle = attr_def(IntegerAttr)
    channel = attr_def(IntegerAttr)
    traits = traits_def(HasParent(PacketFlow))


@irdl_op_definition
class End(IRDLOperation):
    name = "aie.end"
    traits = traits_def(IsTerminator())


class _Region(IRDLOperation):
    """A tile with a region of its own."""

    tile = operand_def(IndexType)
    result = result_def(IndexType)
    body = region_def()
    traits = traits_def(HasParent(Device))

    def verify_(self) -> None:
        if not self.body.blocks or not self.body.blocks.first.ops:
            raise VerifyException(f"{self.name} has an empty body")


@irdl_op_definition
class Mem(_Region):
    name = "aie.mem"


@irdl_op_definition
class MemTileDma(_Region):
    name = "aie.memtile_dma"


@irdl_op_definition
class Core(_Region):
    name = "aie.core"
    link_with = opt_attr_def(StringAttr)


@irdl_op_definition
class DmaStart(IRDLOperation):
    name = "aie.dma_start"
    channel_dir = attr_def(IntegerAttr)
    channel_index = attr_def(IntegerAttr)
    dest = successor_def()
    chain = successor_def()
    valid = result_def(i1)
    traits = traits_def(HasParent(Mem, MemTileDma), IsTerminator())


@irdl_op_definition
class NextBd(IRDLOperation):
    name = "aie.next_bd"
    dest = successor_def()
    traits = traits_def(IsTerminator())


@irdl_op_definition
class UseLock(IRDLOperation):
    name = "aie.use_lock"
    lock = operand_def(IndexType)
    action = attr_def(IntegerAttr)
    value = attr_def(IntegerAttr)

    def verify_(self) -> None:
        if not isinstance(self.lock.owner, Lock):
            raise VerifyException("aie.use_lock uses what is no lock")
        if self.action.value.data not in (1, 2):
            raise VerifyException("aie.use_lock takes with AcquireGreaterEqual or gives with Release on AIE2")


@irdl_op_definition
class DmaBd(IRDLOperation):
    name = "aie.dma_bd"
    buffer = operand_def(MemRefType)
    bd_id = attr_def(IntegerAttr)
    static_len = attr_def(IntegerAttr)
    static_offset = attr_def(IntegerAttr)
    static_sizes = opt_attr_def(DenseArrayBase)
    static_strides = opt_attr_def(DenseArrayBase)
    packet = opt_attr_def(PacketInfo)

    def verify_(self) -> None:
        arrays = [array for array in (self.static_sizes, self.static_strides) if array is not None]
        if len(arrays) == 1 or (arrays and len(arrays[0].get_values()) != len(arrays[1].get_values())):
            raise VerifyException("aie.dma_bd has not as many sizes as strides")


@irdl_op_definition
class RuntimeSequence(IRDLOperation):
    name = "aie.runtime_sequence"
    sym_name = attr_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(HasParent(Device), NoTerminator(), SymbolOpInterface())


@irdl_op_definition
class Configure(IRDLOperation):
    name = "aiex.configure"
    symbol = attr_def(SymbolRefAttr)
    body = region_def("single_block")
    traits = traits_def(HasParent(RuntimeSequence), NoTerminator())

    def verify_(self) -> None:
        module = self.parent_op().parent_op().parent_op()
        names = [op.sym_name.data for op in module.body.block.ops if isinstance(op, Device)]
        if self.symbol.root_reference.data not in names:
            raise VerifyException(f"aiex.configure names no device: {self.symbol}")


@irdl_op_definition
class Run(IRDLOperation):
    name = "aiex.run"
    argument = operand_def(MemRefType)
    runtime_sequence_symbol = attr_def(SymbolRefAttr)
    traits = traits_def(HasParent(Configure))


@irdl_op_definition
class ConfigureTask(IRDLOperation):
    name = "aiex.dma_configure_task"
    tile = operand_def(IndexType)
    channel = attr_def(IntegerAttr)
    direction = attr_def(IntegerAttr)
    issue_token = attr_def(IntegerAttr)
    body = region_def()
    task = result_def(IndexType)
    traits = traits_def(HasParent(RuntimeSequence))

    def verify_(self) -> None:
        for block in self.body.blocks:
            kinds = [type(op) for op in block.ops]
            if kinds.count(DmaBd) != 1 or kinds.count(UseLock) not in (0, 2):
                raise VerifyException("a block of a task has one descriptor, and two locks or none")


class _OnTask(IRDLOperation):
    task = operand_def(IndexType)
    traits = traits_def(HasParent(RuntimeSequence))

    def verify_(self) -> None:
        if not isinstance(self.task.owner, ConfigureTask):
            raise VerifyException(f"{self.name} is of no task")


@irdl_op_definition
class StartTask(_OnTask):
    name = "aiex.dma_start_task"


@irdl_op_definition
class AwaitTask(_OnTask):
    name = "aiex.dma_await_task"


AIE = Dialect(
    "aie",
    [
        Device, Tile, Buffer, Lock, Flow, PacketFlow, PacketSource, PacketDest, End, Mem, MemTileDma, Core, DmaStart,
        NextBd, UseLock, DmaBd, RuntimeSequence,
    ],
    [PacketInfo],
)  # fmt: skip
AIEX = Dialect("aiex", [Configure, Run, ConfigureTask, StartTask, AwaitTask])


def parse(text: str) -> builtin.ModuleOp:
    """Parses and verifies a design in generic form; no other operation is known."""
    context = Context()
    for dialect in (builtin.Builtin, arith.Arith, func.Func, scf.Scf, AIE, AIEX):
        context.load_dialect(dialect)
    module = Parser(context, text).parse_module()
    module.verify()
    return module
