"""What graphics cards can do, as their makers state it, and what of that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

#: Instructions that the four schedulers of an SM issue per cycle, counted per thread (4 x 32), on
#: Ampere, Ada and Hopper alike (CUDA programming guide, "Compute Capabilities").
ISSUE_PER_CYCLE = 128


#: Capabilities of GeForce cards that have kernels: RTX 30, 40, 50.
GEFORCE = (86, 89, 120)


@dataclass(frozen=True)
class Card:
    """One card. Rates per second, dense: bytes, fp16 operations with fp32 sums, int8 operations.

    sms: streaming multiprocessors. clock: boost, in Hz. l2: bytes of the last cache.
    capability: 86 = sm_86. launch: seconds from one kernel to the next within a CUDA graph.
    """

    name: str
    memory: float
    fp16_mma: float
    int8_mma: float
    sms: int
    clock: float
    l2: int
    capability: int
    launch: float

    @property
    def int8(self) -> bool:
        """Whether int8 activations pay: where fp16 products with fp32 sums run at half rate."""
        return self.capability in GEFORCE

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


def geforce(
    name: str, memory: float, sms: int, clock: float, l2: int, capability: int = 89
) -> Card:
    """A GeForce card, or one built alike: per SM and cycle, 512 fp16 operations with fp32 sums and
    four times as many of int8 (whitepapers of GA102, AD102 and GB202, appendices)."""
    fp16 = 512 * sms * clock
    return Card(name, memory, fp16, 4 * fp16, sms, clock, l2, capability, _LAUNCH)


# Bandwidth, SMs, boost clock and L2 as NVIDIA states them (whitepapers, product pages).
CARDS = {
    "rtx-3060": geforce("RTX 3060", 360e9, 28, 1.777e9, 3 << 20, 86),
    "rtx-3090": geforce("RTX 3090", 936e9, 82, 1.695e9, 6 << 20, 86),
    "rtx-4060-ti": geforce("RTX 4060 Ti", 288e9, 34, 2.535e9, 32 << 20),
    "rtx-4070": geforce("RTX 4070", 504e9, 46, 2.475e9, 36 << 20),
    "rtx-4090": geforce("RTX 4090", 1008e9, 128, 2.52e9, 72 << 20),
    "rtx-5090": geforce("RTX 5090", 1792e9, 170, 2.407e9, 96 << 20, 120),
    # H200 SXM data sheet: 4.8 TB/s, 1,979 TFLOPS fp16 and 3,958 TOPS int8 with sparsity, so half
    # of that dense; H100 whitepaper: 132 SMs, 50 MB L2, 1,980 MHz.
    "h200": Card("H200", 4.8e12, 989.5e12, 1979e12, 132, 1.98e9, 50 << 20, 90, _LAUNCH),
}

#: Why others have none: also said where one is asked for.
TOO_OLD = (
    "cards below compute capability 8.0 (RTX 20, GTX, V100, P-series, T4) have no kernels: Triton "
    "does not use their tensor cores"
)
UNSAFE = "on compute capability 10.0 to 11.9 Triton may miscompute the products"


def described(text: str) -> Card:
    """A card in words: `bandwidth=GB/s,tops=INT8,sms=N`, and `sm=CAPABILITY` (default: 89),
    `l2=MB` (default: 32), `name=TEXT` if wanted. tops: dense int8.

    Raises ValueError with what is wrong.
    """
    given = dict(part.partition("=")[::2] for part in text.split(","))
    unknown = given.keys() - {"bandwidth", "tops", "sms", "sm", "l2", "name"}
    lacking = {"bandwidth", "tops", "sms"} - given.keys()
    if unknown or lacking:
        words = f"unknown {', '.join(sorted(unknown))}" if unknown else f"no {sorted(lacking)[0]}"
        raise ValueError(f"{words}; expected bandwidth=GB/s,tops=INT8,sms=N[,sm=89,l2=MB,name=…]")
    name = given.pop("name", "card")
    try:
        numbers = {key: float(value) for key, value in given.items()}
    except ValueError:
        raise ValueError("expected numbers, like bandwidth=504,tops=233,sms=46") from None
    if not all(0 < number < 1e9 for number in numbers.values()):
        raise ValueError("expected numbers above 0")
    capability = int(numbers.get("sm", 89))
    if capability < 80:
        raise ValueError(TOO_OLD)
    if 100 <= capability < 120:
        raise ValueError(UNSAFE)
    tops, sms = numbers["tops"] * 1e12, int(numbers["sms"])
    # Per SM and cycle: int8 operations of GeForce cards, of A100 and of H100.
    rate = {80: 4096, 90: 8192}.get(capability, 2048)
    fp16 = tops / (4 if capability in GEFORCE else 2)
    return Card(
        name, numbers["bandwidth"] * 1e9, fp16, tops, sms, tops / rate / sms,
        int(numbers.get("l2", 32)) << 20, capability, _LAUNCH,
    )  # fmt: skip
