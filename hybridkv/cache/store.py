"""Where the chunks of dynamic lanes are kept, and how those that a step chose become pages that attention reads.

`DeviceStore`: they are pages of the pool already; the chosen ones are listed.

`HostStore`: they are in host memory, of which the device sees a view. Each dynamic lane has *frames* in the pool, as
many as it retrieves chunks, and always reads all of them. A step chooses, keeps what is there, and copies what is
missing into the frames that are not wanted any more. On a CPU "host memory" is an ordinary tensor, and the same code
runs.
"""

import contextlib
import weakref

import torch
from torch import Tensor, nn

from hybridkv.cache.pool import Pool
from hybridkv.cache.retrieve import page_of

PAGE = 4096  # what memory is locked by
FEW = 16  # frames of a lane that may all change hands in one step


def at_once(frames: int) -> int:
    """Of so many frames of a lane, how many may change hands in one step."""
    return max(min(frames, FEW), frames // 2)


class StoreError(MemoryError):
    """Host memory for a store that there is not, or that may not be locked; the message says what helps."""


def entries(table: Tensor, k: Tensor) -> Tensor:
    """Which columns of a table (R, F) are meant: the first k (R,) of each row."""
    return torch.arange(table.shape[1], device=table.device) < k[:, None]


def marked(chunks: Tensor, meant: Tensor, columns: int) -> Tensor:
    """The meant ones of chunk numbers (R, F) as a mask, (R, columns)."""
    at = torch.where(meant, chunks, columns).long()
    none = torch.zeros(len(chunks), columns + 1, dtype=torch.bool, device=chunks.device)
    return none.scatter(1, at, True)[:, :columns]


def exchange(held: Tensor, chosen: Tensor, k: Tensor, there: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which frames change hands so that chosen chunks are in frames.

    A chosen chunk that is in a frame stays there. The n-th of the others takes the n-th frame that is not wanted.

    Args:
        held: (R, F) chunk in each frame, -1 for none. chosen: (R, F) chunks, each once; of both the first k (R,) of a
            row are meant.
        there: (R, C) bool, the chunks that are in frames.
        most: frames of a row that change hands at once. Chunks that it leaves out may come in a later step.

    Returns:
        columns of `held` (R, most), the chunks that go there (R, most), and how many of a row are meant (R,).
    """
    meant = entries(held, k)
    wanted = marked(chosen, meant, there.shape[1]).gather(1, held.clamp(min=0).long())
    stays = meant & (held >= 0) & wanted
    missing = meant & ~there.gather(1, chosen.long())
    n = torch.arange(1, most + 1, device=held.device).repeat(len(held), 1)
    last = held.shape[1] - 1  # where there is no n-th one
    column, place = (
        torch.searchsorted(each.cumsum(1), n).clamp(max=last) for each in (meant & ~stays, missing)
    )  # as many of the one as of the other
    return column, chosen.gather(1, place), missing.sum(1).clamp(max=most)


class DeviceStore(nn.Module):
    """The first pages of the pool."""

    def append(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """The pool's tail page is the store's: nothing is left to do."""


class HostStore(nn.Module):
    """Chunks in host memory, as the device sees it. What the frames in a pool hold is the pool's `held`.

    However large it is: kernels that the compiler writes count in 64 bits where a tensor asks for it.

    Args:
        pages: of the store.
        like: a tensor with the dtype and device of the keys.
        stickiness: see `HybridConfig`.
    """

    def __init__(self, pages: int, page_size: int, like: Tensor, stickiness: float):
        super().__init__()
        self.page_size, self.stickiness = page_size, stickiness
        for name in ("keys", "values"):
            shape = (1, 1, pages * page_size, like.shape[-1])
            self.register_buffer(name, host_tensor(shape, like.dtype, like.device, owner=self), persistent=False)

    def append(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Writes keys and values (N, D) to slots (N,) of the store."""
        self.keys.index_copy_(2, slots, k[None, None])
        self.values.index_copy_(2, slots, v[None, None])

    def there(self, pool: Pool, frames: Tensor, k: Tensor, columns: int) -> Tensor:
        """Which chunks are in frames: frames (R, F) pages of the pool, the first k (R,) of a row -> (R, columns)."""
        held = pool.held[frames]
        return marked(held, entries(held, k) & (held >= 0), columns)

    def favour(self, there: Tensor) -> Tensor | None:
        """What the mass of each chunk is multiplied by before the best are chosen, (R, C); None for nothing."""
        return None if self.stickiness == 1 else 1 + there * (self.stickiness - 1)

    def fetch(
        self, pool: Pool, chosen: Tensor, k: Tensor, frames: Tensor, first: Tensor, there: Tensor, most: int
    ) -> Tensor:
        """Brings the chosen chunks into frames, and copies only those that are not in one yet.

        Args:
            pool: with the frames.
            chosen: (R, F) chunks of each lane. frames: (R, F) pages of the pool. The first k (R,) of a row are meant.
            first: (R, 3) where each lane's chunks lie in the store, see `page_of`.
            there: as `there` says.
            most: see `exchange`.

        Returns:
            (R,) how many were copied.
        """
        column, chunk, n = exchange(pool.held[frames], chosen, k, there, most)
        copied = entries(column, n)
        frame = torch.where(copied, frames.gather(1, column), 0)  # else the null page, which holds whatever
        page = torch.where(copied, page_of(first, chunk), 0)
        offset = torch.arange(self.page_size, device=frames.device)
        source, target = ((pages[..., None] * self.page_size + offset).flatten().long() for pages in (page, frame))
        read = copied[..., None].expand(-1, -1, self.page_size).reshape(-1, 1).expand(-1, pool.keys.shape[-1])
        for store, into in ((self.keys, pool.keys), (self.values, pool.values)):
            # A load under a mask: what is not copied costs nothing on the way from the host.
            got = torch.ops.aten._unsafe_masked_index(store[0, 0], read, [source], 0.0)
            into.index_copy_(2, target, got[None, None])
        pool.held.index_copy_(0, frame.flatten().long(), chunk.flatten().to(pool.held))
        return n

    def extra_repr(self) -> str:
        return f"{self.keys.nbytes + self.values.nbytes} bytes in host memory"


class HostMemory:
    """An ordinary tensor of the host, to be seen from a GPU: CUDA's and ROCm's array interface."""

    def __init__(self, data: Tensor):
        self.data = data  # lives as long as what sees it
        self.__cuda_array_interface__ = dict(
            shape=(data.numel(),), typestr="|u1", data=(data.data_ptr(), False), version=3, strides=None
        )


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: object) -> Tensor:
    """A tensor in host memory that kernels of the device read and write; its memory is the owner's, and goes with it.

    Locked by `cudaHostRegister`, page by page: torch's own allocator for pinned memory takes powers of two.

    Raises:
        StoreError: the host has not so much, or may not lock it.
    """
    numbers = torch.Size(shape).numel()
    size = -(-numbers * dtype.itemsize // PAGE) * PAGE
    try:
        block = torch.empty(size + PAGE * (device.type != "cpu"), dtype=torch.uint8)
    except RuntimeError as e:
        raise StoreError(f"the store takes {size:,} bytes of host memory, which there are not") from e
    if device.type == "cpu":
        return block[: numbers * dtype.itemsize].view(dtype).view(shape)
    data = block[-block.data_ptr() % PAGE :][:size]
    return lock(data, device, owner)[: numbers * dtype.itemsize].view(dtype).view(shape)


def lock(data: Tensor, device: torch.device, owner: object) -> Tensor:
    """The device's view of host memory, which stays locked as long as the owner lives."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        status = runtime.cudaHostRegister(data.data_ptr(), data.numel(), 3)  # portable, mapped
    if int(status) != 0:
        forget_error(device)
        raise StoreError(
            f"{data.numel():,} bytes of host memory can't be locked for the device ({status}): raise the limit "
            '(ulimit -l, memlock), use a smaller prompt or batch, or HybridConfig(store="device")'
        )
    weakref.finalize(owner, unlock, data, device).atexit = False  # the driver frees what is left at the end
    view = torch.as_tensor(HostMemory(data), device=device)
    if view.data_ptr() != data.data_ptr():
        raise StoreError('this device has no view of host memory: use HybridConfig(store="device")')
    return view


def forget_error(device: torch.device) -> None:
    """CUDA reports a call that failed once more at the next kernel's start: here, not in the middle of what follows."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def unlock(data: Tensor, device: torch.device) -> None:
    """Once no kernel can read it any more."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
