"""How much a run holds in memory, and what of it fits into a budget: pure, from sizes to numbers.

A budget is for the resident memory of a command at its peak, libraries and model included. What a run holds grows with
four numbers: tiles a batch, batches in the network, threads that read, and workers that find nuclei. Workers and
readers change no byte of the result and are lowered first, to one each; the others show in the last bits.

The constants were measured, and lie above what was seen: benchmarks/memory.py compares budgets with peaks.
"""

from dataclasses import astuple, dataclass, replace
from itertools import product
from operator import add

from pydantic import ByteSize, TypeAdapter, ValidationError

from wsipipe.errors import ConfigError
from wsipipe.tiles import TileGeometry

MB = 10**6
WRITES_AHEAD = 2  # batches that may wait for the writer: a chunk being compressed must not stop the network
STEP = 50 * MB  # to which figures are rounded up
# The process as its stages begin. By chance less may be there, for pages of libraries come and go; more is counted.
WITH_NETWORK, WITHOUT_NETWORK = 1000 * MB, 300 * MB
LATER = 150 * MB  # libraries and machine code that come only when they are used
NETWORK_FACTOR, NETWORK_FIXED = 1.7, 40 * MB  # of its tensors: what kernels and the allocator take besides
READER = 30 * MB  # what is decoded and resampled at once
BLOCK_PX = 50  # bytes a pixel of a block with its halo, beside its maps
BLOCK_NUCLEI = 10 * MB
TABLE, TABLE_PX = 60 * MB, 1500  # and for each pixel of the slide's width: rows of squares, put in order one by one
PROCESS = 400 * MB  # of a worker that is a process: its libraries
MASK_PX = 50  # bytes a pixel of the tissue mask while it is made


@dataclass(frozen=True, slots=True)
class Choice:
    """How much is done at once; 0 where there is nothing of the kind. Those of several stages add up."""

    batch_size: int = 0  # tiles
    networks: int = 0  # batches in the network at a time
    readers: int = 0
    workers: int = 0

    def __add__(self, other: "Choice") -> "Choice":
        return Choice(*map(add, astuple(self), astuple(other)))

    def __str__(self) -> str:
        told = (
            (self.batch_size, f"batches of {self.batch_size}"),
            (self.networks, f"networks: {self.networks}"),
            (self.readers, f"readers: {self.readers}"),
            (self.workers, f"workers: {self.workers}"),
        )
        return ", ".join(text for number, text in told if number)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a run holds, by what they grow with. Those of several stages add up."""

    fixed: int = 0
    tile: int = 0  # for each tile of a batch
    network_tile: int = 0  # for each tile of a batch and each network
    read_tile: int = 0  # for each tile of a batch and each reader
    network: int = 0
    reader: int = 0
    worker: int = 0

    def __add__(self, other: "Needs") -> "Needs":
        return Needs(*map(add, astuple(self), astuple(other)))

    def at(self, choice: Choice) -> int:
        """Bytes in all."""
        return (
            self.fixed
            + choice.batch_size * (self.tile + choice.networks * self.network_tile + choice.readers * self.read_tile)
            + choice.networks * self.network
            + choice.readers * self.reader
            + choice.workers * self.worker
        )


def parse_memory(text: str) -> int:
    """Bytes of "3GB", "1.5GiB" or "800 MB".

    Raises
    ------
    ConfigError
        If the text says no amount of memory.

    Examples
    --------
    >>> parse_memory("3GB"), parse_memory("1.5 GiB")
    (3000000000, 1610612736)
    """
    try:
        amount = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        amount = 0
    if amount < MB:
        raise ConfigError(f"--memory {text} is no amount of memory; give it as 3GB or 1500MiB")
    return amount


def maps_needs(geometry: TileGeometry, types: int, network_tile: int, weights: int) -> Needs:
    """What running the network takes.

    Parameters
    ----------
    types : int
        Channels of NC.
    network_tile : int
        Bytes of the tensors that the network holds at once for a tile; 0 where it has memory of its own.
    weights : int
        Bytes of the weights that come to lie in memory once more.
    """
    planes = 3 + types  # NP, HV, NC: a byte a pixel each
    pixels, answer = 3 * geometry.tile_px**2, planes * geometry.core_px**2
    return Needs(
        fixed=weights + 2 * planes * geometry.chunk_px**2,  # a chunk, and what is written of it
        tile=(WRITES_AHEAD + 2) * answer + 4 * pixels,  # with the writer and on the way to it; read, cut and waiting
        network_tile=round(NETWORK_FACTOR * network_tile) + answer + pixels,
        read_tile=2 * pixels,  # read ahead, and what its tiles are cut from
        network=NETWORK_FIXED if network_tile else 0,
        reader=READER,
    )


def nuclei_needs(geometry: TileGeometry, types: int, halo_px: int, width_px0: int, *, processes: bool = False) -> Needs:
    """What finding nuclei takes on a slide of that width, a worker a block, and a block being a chunk with its halo."""
    pixels = (geometry.chunk_px + 2 * halo_px) ** 2
    planes = 3 + types
    block = (BLOCK_PX + 2 * planes) * pixels + BLOCK_NUCLEI  # maps are there twice, decoded and put together
    return Needs(fixed=TABLE + TABLE_PX * width_px0, worker=block + (PROCESS if processes else 0))


def choose(budget: int, needs: Needs, most: Choice, *, batch_is_given: bool = False) -> Choice:
    """The most that fits into a budget, up to `most`: workers are lowered first, then readers, networks, the batch.

    Parameters
    ----------
    batch_is_given : bool
        The size of a batch is as somebody said, and stays.

    Raises
    ------
    ConfigError
        If one of each is too much; says how much it takes.
    """
    batches = [most.batch_size]
    while batches[-1] > 1 and not batch_is_given:
        batches.append(batches[-1] // 2)
    least = Choice(batches[-1], min(1, most.networks), min(1, most.readers), min(1, most.workers))
    for batch_size, networks, readers in product(
        batches, range(most.networks, least.networks - 1, -1), range(most.readers, least.readers - 1, -1)
    ):
        choice = Choice(batch_size, networks, readers, least.workers)
        left = budget - needs.at(choice)
        if left >= 0:
            more = left // needs.worker if needs.worker else most.workers
            return replace(choice, workers=min(most.workers, least.workers + more))
    smaller = ", or a smaller --batch-size" if batches[-1] > 1 else ""
    raise ConfigError(
        f"--memory {shown(budget)} is too little: with {least} this takes {shown(rounded_up(needs.at(least)))}; "
        f"give that or more{smaller}"
    )


def rounded_up(amount: int) -> int:
    """To the next step."""
    return -(-amount // STEP) * STEP


def shown(amount: int) -> str:
    """An amount as `parse_memory` takes it, exactly: of parts of a gigabyte that loses a byte.

    Examples
    --------
    >>> shown(3 * 10**9), shown(1_350_000_000)
    ('3GB', '1350MB')
    """
    return f"{amount / MB:.0f}MB" if amount % (1000 * MB) else f"{amount // (1000 * MB)}GB"
