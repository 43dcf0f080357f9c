"""Functions of tensors on a CUDA device, recorded once for each size and replayed: one launch for all their kernels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._plan import for_graphs

Function = Callable[..., tuple[Tensor, ...]]
_WARM_UPS = 3  # calls before it is recorded: what is compiled, tuned or laid out at the first ones is no part of it


class Recorded(NamedTuple):
    """A function that reads ``inputs`` and writes ``outputs``, always the same memory."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class Pool(NamedTuple):
    """Memory of graphs, and the stream that records them: torch's allocator shares none between streams."""

    handle: tuple[int, int]
    stream: torch.cuda.Stream


class Graphs:
    """``function`` on CUDA devices as graphs, one for each size: inputs are copied in, outputs are copies.

    Recorded at the first call with the shapes, strides, types and device of its inputs; the ``most`` graphs that were
    used last are kept. Those of a device share one pool of memory, so that they need as much as the largest, and calls
    take turns there, whatever their threads and streams. The function must not wait for the device, nor draw random
    numbers. What it reads beside its inputs must not change: else :meth:`clear`.

    It is called as it is on other devices, where gradients are enabled, and while a graph around it is recorded.

    Raises:
        ValueError: ``most`` is not a positive int.
    """

    def __init__(self, function: Function, most: int = 16):
        if type(most) is not int or most < 1:
            raise ValueError(f"most: expected a positive int, got {most!r}")
        self.function, self.most = function, most
        self._kept: OrderedDict[tuple, Recorded] = OrderedDict()
        self._pools: dict[torch.device, Pool] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}  # of the last call, after its outputs were copied
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not _applies(tensors):
            return self.function(*tensors)
        device = tensors[0].device
        key = (device, *((t.shape, t.stride(), t.dtype) for t in tensors))
        with self._lock:
            self._take_turn(device)
            if key not in self._kept:
                self._kept[key] = self._recorded(tensors, device)
            self._kept.move_to_end(key)
            inputs, outputs, replay = self._kept[key]
            for static, given in zip(inputs, tensors, strict=True):
                static.copy_(given)
            replay()
            results = tuple(static.clone() for static in outputs)
            self._end_turn(device, inputs)
        return results

    def clear(self) -> None:
        """Forget all graphs: the next call of each size records it again."""
        with self._lock:
            self._kept.clear()

    def __getstate__(self):
        """A copy records its own."""
        return self.function, self.most

    def __setstate__(self, state):
        self.__init__(*state)

    def _recorded(self, tensors: tuple[Tensor, ...], device: torch.device) -> Recorded:
        if len(self._kept) >= self.most:
            self._kept.popitem(last=False)
        if all(key[0] != device for key in self._kept):
            self._pools.pop(device, None)  # one that no graph uses any more is lost
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = Pool(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
        try:
            return _record(self.function, tensors, self._pools.get(device))
        except BaseException:
            self._pools.pop(device, None)  # torch may take it for one that is still being recorded to
            raise

    def _take_turn(self, device: torch.device) -> None:
        """The current stream waits for the call before, which may be another stream's: both use the same memory."""
        if device in self._done:
            torch.cuda.current_stream(device).wait_event(self._done[device])

    def _end_turn(self, device: torch.device, inputs: tuple[Tensor, ...]) -> None:
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if device not in self._done:
            self._done[device] = torch.cuda.Event()
        self._done[device].record(stream)
        for static in inputs:  # should the graph be dropped, their memory waits for this call
            static.record_stream(stream)


_recording = threading.local()
_one_at_a_time = threading.Lock()  # as torch wants it in a process


def _applies(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call is one for a graph."""
    device = tensors[0].device if tensors else None
    return (
        device is not None
        and device.type == "cuda"
        and all(t.device == device for t in tensors)
        and not torch.is_grad_enabled()
        and not getattr(_recording, "on", False)
        and not torch.cuda.is_current_stream_capturing()
    )


def _record(function: Function, tensors: tuple[Tensor, ...], pool: Pool) -> Recorded:
    """``function`` over copies of ``tensors``, warmed up and recorded on the pool's stream."""
    # Tensors made in inference mode could not be written to outside of it.
    with _one_at_a_time, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(tensors[0].device):
        inputs = tuple(torch.empty_like(t).copy_(t) for t in tensors)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool.stream.wait_stream(current)
        _recording.on = True
        try:
            # torch.cuda.graph does not leave the stream after a failure.
            with for_graphs(), torch.cuda.stream(pool.stream):
                for _ in range(_WARM_UPS):
                    function(*inputs)
                # What other threads do meanwhile does not concern the recording.
                options = dict(pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local")
                with torch.cuda.graph(graph, **options):
                    outputs = tuple(function(*inputs))
        finally:
            _recording.on = False
        current.wait_stream(pool.stream)
    return Recorded(inputs, outputs, graph.replay)
