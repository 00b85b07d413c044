"""What graphics cards can do, as their makers state it, and what of that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

#: Instructions that the four schedulers of an SM issue per cycle, counted per thread (4 x 32), on
#: Ampere, Ada and Hopper alike (CUDA programming guide, "Compute Capabilities").
ISSUE_PER_CYCLE = 128


@dataclass(frozen=True)
class Card:
    """One card. Rates per second, dense: bytes, fp16 operations with fp32 sums, int8 operations.

    sms: streaming multiprocessors. clock: boost, in Hz. l2: bytes of the last cache.
    int8: whether int8 activations pay: where fp16 products with fp32 sums run at half rate.
    launch: seconds from one kernel to the next within a CUDA graph.
    """

    name: str
    memory: float
    fp16_mma: float
    int8_mma: float
    sms: int
    clock: float
    l2: int
    int8: bool
    launch: float

    @property
    def issue(self) -> float:
        """Thread instructions per second."""
        return self.sms * ISSUE_PER_CYCLE * self.clock


@dataclass(frozen=True)
class Shares:
    """How much of a card's rates kernels reach, 1 being the ideal.

    memory: chosen so that plain decoding of 8B Q4_K_M on an RTX 3090, attention and launches
    included, comes out at 69 % of peak bandwidth: the fastest 4-bit runtimes for one stream are
    seen at 66-78 % (exllamav3, ik_llama, AWQ in SGLang and vLLM).
    compute: of MMA and issue slots; kernels/LOG.md expects 6.8-7.5 ms for products that an RTX
    3090 could do in 6.8 ms, so 0.91 or better. Both stay guesses until there is a device.
    """

    memory: float = 0.80
    compute: float = 0.90


DEFAULT_SHARES = Shares()
IDEAL = Shares(1.0, 1.0)

#: The gap between short kernels of a graph is about 0.5 us (NVIDIA's blog "Getting Started with
#: CUDA Graphs": 3.4 us per kernel that runs for 2.9 us); filling and draining a card, during which
#: memory idles, takes about as long as two accesses to it (0.5 us each). The least certain figure.
_LAUNCH = 1.5e-6

CARDS = {
    # GA102 whitepaper (appendix A): 936 GB/s, 71 TFLOPS fp16 with fp32 sums, 284 TOPS int8, 82 SMs
    # at 1,695 MHz, 6 MB L2.
    "rtx-3090": Card("RTX 3090", 936e9, 71e12, 284e12, 82, 1.695e9, 6 << 20, True, _LAUNCH),
    # Ada whitepaper (appendix A): 1,008 GB/s, 165.2 TFLOPS fp16 with fp32 sums, 660.6 TOPS int8,
    # 128 SMs at 2,520 MHz, 72 MB L2.
    "rtx-4090": Card("RTX 4090", 1008e9, 165.2e12, 660.6e12, 128, 2.52e9, 72 << 20, True, _LAUNCH),
    # H200 SXM data sheet: 4.8 TB/s, 1,979 TFLOPS fp16 and 3,958 TOPS int8 with sparsity, so half
    # of that dense; H100 whitepaper: 132 SMs, 50 MB L2, 1,980 MHz.
    "h200": Card("H200", 4.8e12, 989.5e12, 1979e12, 132, 1.98e9, 50 << 20, False, _LAUNCH),
}
