"""The `calibrated` cost model: a program's instructions on a device that is as slow as hardware was measured to be.

Three factors, each from a source, and nothing fitted to our own programs:

* Cores multiply at 44.8 % of their peak: int8 convolutions of the vendor's DPU on Phoenix at 1.8 GHz, measured for a
  whole column. That includes what a call costs before and after its inner loop. (An open int8 matrix product: 41.9 % of
  the whole call, 88.9 % of its inner loop. The open mlir-aie conv2d: 3 to 11 %.)
* A channel between array and DDR carries 3.9 bytes a cycle at most: one shim channel of Phoenix, 7.0 GB/s at 1.8 GHz.
* A stream inside the array carries 4 bytes a cycle at most: 32 bits (AM020, AIE-ML stream switch).

How far times are from what was measured:

====================================================== ============ ======= ==========
anchor                                                 measured     exact   calibrated
====================================================== ============ ======= ==========
open int8 matrix product, Phoenix, MACs/cycle and core 107          256     115 (+7 %)
its inner loop                                         228          256     115 (-50 %)
one shim channel, Phoenix, GB/s                        7.0          7.0     7.0
dense ResNet-50, 16 convolution and 4 other cores of a
VE2802 at 1.25 GHz (DPUCV2DX8G), ms an image           2.97         3.28    3.70 (+25 %)
====================================================== ============ ======= ==========

The last row is our program for ve2802_4x4: two of its four columns have a NoC DMA, and loading all weights for every
image takes 2.4 ms of it; it has no cores besides for what isn't a convolution.

Not in it, for want of a measurement: efficiency of element operations, cycles of a lock or of a buffer descriptor, the
time to program the array. Work on a part whose DDR is slower than its channels needs `ddr` rates in the device file.
"""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.aie.device import DeviceSpec

MAC_EFFICIENCY = 0.448
DDR_BYTES_PER_CYCLE = 3.9
STREAM_BYTES_PER_CYCLE = 4.0


def measured(device: DeviceSpec) -> DeviceSpec:
    """The device with cores and links as slow as measured; links that are slower already stay as they are.

    Args:
        device: what the program was compiled for.

    Example:
        >>> measured(DeviceSpec.load("npu1")).core.macs_per_cycle
        115
    """
    core = replace(device.core, macs_per_cycle=max(1, round(MAC_EFFICIENCY * device.core.macs_per_cycle)))
    links = {}
    for name, rate in vars(device.links).items():
        most = DDR_BYTES_PER_CYCLE if name in ("load", "loadw", "write") else STREAM_BYTES_PER_CYCLE
        links[name] = min(rate, int(most * device.clock_hz))
    return replace(device, core=core, links=replace(device.links, **links))
