"""Activations that wait for their backward pass in host memory.

Copies run on a stream of their own, beside the kernels: a block's activations leave while later blocks compute, and
come back while the block above is in its backward pass. Three rules keep memory sound, whatever the host runs ahead:

- On the way out, tensors are held until two blocks later, where the compute stream waits for their copies.
- On the way back, the copy stream first waits for what the compute stream was given so far, because the memory that a
  tensor gets may have been in use there; the compute stream then waits for the copies before the block needs them.
- A host buffer is touched by the copy stream alone, which does one copy after the other, so that it is free for the
  next block as soon as its last copy is queued.
"""

import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

SMALLEST = 2**15
"""Bytes below which a tensor stays on the device: it would not be worth a copy."""


class HostMemory:
    """Page-locked buffers that are used again: locking pages takes longer than copying them."""

    def __init__(self, device: torch.device) -> None:
        self.page_locked = device.type == "cuda"
        self.allocated = 0
        self.free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, uint8 [num_bytes].

        Raises:
            MemoryError: where the pages can't be locked.
        """
        if self.free[num_bytes]:
            return self.free[num_bytes].pop()
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if self.page_locked:
            # PyTorch's own page-locked memory comes in powers of two, up to twice of what is asked for.
            runtime: Any = torch.cuda.cudart()
            error = runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)
            if int(error) != 0:
                raise MemoryError(
                    f"{num_bytes / 2**30:.2f} GiB of host memory could not be page-locked ({error}) after "
                    f"{self.allocated / 2**30:.1f} GiB in this process: lower activation_checkpoint.offload_layers, or "
                    "with mode auto activation_checkpoint.host_memory_gib"
                )
            # Addresses are used again by what is allocated later, which must not find them locked.
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
        self.allocated += num_bytes
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Makes it available again."""
        self.free[buffer.numel()].append(buffer)


class Parked:
    """The storage of activations on its way to the host, there, or on its way back."""

    def __init__(self, on_device: torch.Tensor, on_host: torch.Tensor) -> None:
        self.on_device: torch.Tensor | None = on_device
        self.on_host: torch.Tensor | None = on_host
        self.views = 0


@dataclass
class View:
    """What autograd holds in an activation's place."""

    parked: Parked
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


@dataclass
class Shelf:
    """What a block has parked in one forward pass, by the address on the device."""

    below: "Shelf | None"
    parked: dict[int, Parked] = field(default_factory=dict)
    gone: Any = None  # event: what has been parked is on the host
    back: Any = None  # event: it is on the device again
    fetched: bool = False
    reached: bool = False


class HostOffload:
    """Parks activations on the host, and fetches them one block ahead of the backward pass.

    Works on any device; on a CPU, which has no streams, each copy is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.copies = self.streams.Stream()
        self.memory = HostMemory(device)
        self.top: Shelf | None = None

    def open_shelf(self, *, bottom: bool) -> Shelf:
        """For the block whose forward pass begins now; `bottom`: it is the model's first."""
        if bottom:
            self.clear()
        self.top = shelf = Shelf(below=None if bottom else self.top)
        two_below = shelf.below.below if shelf.below else None
        if two_below and two_below.parked:
            self.streams.current_stream().wait_event(two_below.gone)
            for parked in two_below.parked.values():
                parked.on_device = None
        return shelf

    def clear(self) -> None:
        """Takes back the buffers of a forward pass that no backward pass has followed."""
        shelf = self.top
        while shelf:
            for parked in shelf.parked.values():
                if parked.on_host is not None:
                    self.memory.give_back(parked.on_host)
                    parked.on_host = None
            shelf = shelf.below

    def park(self, shelf: Shelf, tensor: torch.Tensor) -> View:
        """Starts the copy of a tensor's storage, unless another view of it is parked already."""
        storage = tensor.untyped_storage()
        parked = shelf.parked.get(storage.data_ptr())
        if parked is None:
            on_device = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
            on_host = self.memory.take(on_device.numel())
            self.copies.wait_stream(self.streams.current_stream())
            with self.streams.stream(self.copies):
                on_host.copy_(on_device, non_blocking=True)
            shelf.gone = self.copies.record_event()
            parked = shelf.parked[storage.data_ptr()] = Parked(on_device, on_host)
        parked.views += 1
        return View(parked, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def fetch(self, shelf: Shelf) -> None:
        """Starts the copies back, of what has left the device."""
        if shelf.fetched:
            return
        shelf.fetched = True
        self.copies.wait_stream(self.streams.current_stream())
        for parked in shelf.parked.values():
            assert parked.on_host is not None, "another forward pass has begun before this one's backward pass"
            if parked.on_device is None:
                parked.on_device = torch.empty_like(parked.on_host, device=self.device, pin_memory=False)
                with self.streams.stream(self.copies):
                    parked.on_device.copy_(parked.on_host, non_blocking=True)
            self.memory.give_back(parked.on_host)
            parked.on_host = None
        shelf.back = self.copies.record_event()

    def reach(self, shelf: Shelf) -> None:
        """The backward pass is at this shelf's block: its tensors are waited for, and those of the next one started."""
        if shelf.reached:
            return
        shelf.reached = True
        self.fetch(shelf)
        if shelf.parked:
            self.streams.current_stream().wait_event(shelf.back)
        if shelf.below:
            self.fetch(shelf.below)

    def recover(self, view: View) -> torch.Tensor:
        """The activation, on the device again. Memory goes with the last view of it."""
        parked = view.parked
        assert parked.on_device is not None, "the backward pass ran twice"
        storage = parked.on_device.untyped_storage()
        parked.views -= 1
        if parked.views == 0:
            parked.on_device = None
        return torch.empty(0, dtype=view.dtype, device=self.device).set_(storage, view.offset, view.size, view.stride)


class OffloadedBlock(ActivationWrapper):
    """A block, what it keeps for its backward pass being parked on the host.

    Weights and tensors without a gradient, which others keep anyway, stay on the device, and small tensors.
    """

    def __init__(self, block: nn.Module, offload: HostOffload, index: int, *, parks: bool) -> None:
        """`index` of the block in its model; `parks`: False for a block that keeps all on the device.

        Blocks above those that park take part too: the last one of them gets the first copies back.
        """
        super().__init__(block)
        self.offload, self.index, self.parks = offload, index, parks

    def forward(self, *arguments: Any) -> Any:
        block = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():
            return block(*arguments)
        offload = self.offload
        shelf = offload.open_shelf(bottom=self.index == 0)
        constants = [x for x in arguments if isinstance(x, torch.Tensor) and not x.requires_grad]

        def pack(tensor: torch.Tensor) -> torch.Tensor | View:
            storage = tensor.untyped_storage()
            if not self.parks or storage.nbytes() < SMALLEST:
                return tensor
            # FSDP gives the weights their whole size for the time of the forward pass: they are known only now.
            if any(storage.data_ptr() == x.untyped_storage().data_ptr() for x in (*block.parameters(), *constants)):
                return tensor
            return offload.park(shelf, tensor)

        def unpack(packed: torch.Tensor | View) -> torch.Tensor:
            offload.reach(shelf)
            return offload.recover(packed) if isinstance(packed, View) else packed

        with saved_tensors_hooks(pack, unpack):
            return block(*arguments)
