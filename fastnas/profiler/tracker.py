"""Every block of tensor memory from its birth to its death, as a dispatch mode: the same for real and fake tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastnas.profiler.flops import flops

CATEGORIES = (
    "parameters",
    "gradients",
    "optimiser state",
    "architecture parameters",
    "buffers",
    "input batch",
    "saved activations",
    "temporaries",
)
_DEVICE = torch.ops.prim.device.default
_STAGE = torch.ops.fastnas.conv_stage_fwd.default
BATCH, SAVED, TEMPORARY = "input batch", "saved activations", "temporaries"


@dataclass(eq=False)
class Block:
    """One storage. `module`: the module that made it; `shares`: bytes of each module, where a fused op made it for
    several; `category`: known from its owner, or found in the end."""

    size: int
    module: str
    category: str = TEMPORARY
    shares: dict[str, int] | None = None


@dataclass(eq=False)
class Pass:
    """One forward pass and what it saved for its backward pass, each block once."""

    phase: str
    saved: list[Block]

    @property
    def bytes(self) -> int:
        return sum(block.size for block in self.saved)


@dataclass(frozen=True)
class Event:
    """A block's birth (`size` > 0) or death (`size` < 0), after `operation` calls, within `phase`."""

    operation: int
    phase: str
    block: Block
    size: int


class Tracker(TorchDispatchMode):
    """Within the block, `events` lists the births and deaths of all storages that ops make, in order.

    A view or an in-place result adds nothing; a storage counts until its last tensor is gone. Scratch memory inside
    a kernel is not seen. Memory that exists already is announced with `own`. Saved activations are what
    `saved_tensors_hooks` sees, deduplicated by storage, less what was announced as anything but the input batch.

    `granularity`: sizes are rounded up to a multiple of it, as the device's allocator does.
    """

    def __init__(self, modules: dict[nn.Module, str] | None = None, granularity: int = 1) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.passes: list[Pass] = []
        self.operations = 0
        self.flops = {"forward": 0, "backward": 0}
        self._granularity = granularity
        self._modules = modules or {}
        self._owners = {_place(p): name for part, name in self._modules.items() for p in part.parameters(recurse=False)}
        self._stack = [""]
        self._labels = ["step"]
        self._alive: dict[int, tuple[weakref.ref, Block]] = {}
        self._pass: Pass | None = None
        self._in_pass: set[int] = set()
        self._idle = False  # while the tracker itself calls PyTorch
        self._context = contextlib.ExitStack()

    # What runs within the block.

    def __enter__(self) -> Tracker:
        context = self._context
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        ):
            context.callback(handle.remove)
        context.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._context.close()
        self._alive.clear()  # the dead tell no more tales

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._idle or func is _DEVICE:
            return out
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, (list, tuple)):
            for part in out:
                if isinstance(part, Tensor):
                    self._see(part)
        elif out is not None:
            return out  # a question about a tensor, not an operation
        if func is _STAGE:
            self._share(out[0], args[4])
        self.operations += 1
        if _in_backward():
            self._pass = None  # what is saved after this belongs to another pass
            self.flops["backward"] += flops(func, args, kwargs, out)
        else:
            self.flops["forward"] += flops(func, args, kwargs, out)
        return out

    @contextlib.contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Events within carry `name` as their phase; backward passes and updates of optimisers add their own word."""
        self._labels.append(name)
        try:
            yield
        finally:
            self._labels.pop()

    @property
    def phase(self) -> str:
        return self._labels[-1] + (", backward" if _in_backward() else "")

    # Memory.

    def own(self, tensors: Iterable[Tensor], category: str) -> None:
        """Announce tensors that exist, or whose purpose is known only now."""
        for tensor in tensors:
            self._see(tensor)
            if block := self.block_of(tensor):
                block.category = category

    def block_of(self, tensor: Tensor) -> Block | None:
        """The block that the tensor lies in; None for a tensor without elements."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry else None

    def withdraw(self, blocks: Iterable[Block]) -> None:
        """Forget blocks that were announced, as if they had never been."""
        unwanted = set(map(id, blocks))
        self.events = [event for event in self.events if id(event.block) not in unwanted]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        if not size:
            return
        block = Block(size, self._stack[-1])
        self._alive[key] = weakref.ref(storage, lambda _: self._died(key, block)), block
        self.events.append(Event(self.operations, self.phase, block, size))

    def _share(self, z: Tensor, pointwise: Sequence[Tensor]) -> None:
        """Part the maps of a convolution stage among the modules that hold its pointwise weights [O, C, 1, 1]."""
        block, rows = self.block_of(z), sum(len(weight) for weight in pointwise)
        shares: Counter[str] = Counter()
        for weight in pointwise:
            shares[self._owners.get(_place(weight), self._stack[-1])] += block.size * len(weight) // rows
        block.shares = dict(shares)

    def _died(self, key: int, block: Block) -> None:
        if self._alive.pop(key, None) is not None:
            self._in_pass.discard(key)
            self.events.append(Event(self.operations, self.phase, block, -block.size))

    def _pack(self, tensor: Tensor) -> Tensor:
        self._see(tensor)
        key = tensor.untyped_storage()._cdata
        if entry := self._alive.get(key):
            block = entry[1]
            if block.category == TEMPORARY:
                block.category = SAVED
            if block.category in (SAVED, BATCH) and not _in_backward():
                self._add_to_pass(key, block)
        if tensor.is_leaf:
            return tensor
        self._idle = True
        try:
            return tensor.detach()  # an output that its own node keeps would be a cycle, and live on
        finally:
            self._idle = False

    def _add_to_pass(self, key: int, block: Block) -> None:
        if self._pass is None:
            self._pass = Pass(self.phase, [])
            self._in_pass.clear()
            self.passes.append(self._pass)
        if key not in self._in_pass:
            self._in_pass.add(key)
            self._pass.saved.append(block)

    # Where and when.

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._modules.get(module, self._stack[-1]))

    def _leave_module(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._labels.append(f"{self._labels[-1]}, update")
        self.own((p.grad for p in parameters_of(optimizer) if p.grad is not None), "gradients")

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._labels.pop()
        self.own(state_of(optimizer), "optimiser state")


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins: the same for a parameter and a view of all of it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
