"""A GPU that is none: tensors say that they lie on ``cuda:0``, are computed on the CPU, and must not meet others there.

``with a_pretended_gpu():`` refuses what a real one would: an operation on tensors of both devices (a CPU's single number and a
CPU's index into a GPU's tensor may), ``.numpy()`` of a GPU's tensor, a generator of the other device. It knows the device of a
tensor by its storage. Inside torch's own Python functions tensors show their true device, and other threads see none of this.
It also notes where the host would wait for the GPU: for a number, for indices whose count is not known before, for a copy.
"""

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mogan

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
MAY_MIX = {_aten.copy_.default, _aten.set_.source_Tensor, _aten.is_same_size.default}
MAY_INDEX = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
WAIT = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}
OURS = str(Path(mogan.__file__).parent)
JOIN = {_aten.cat.default, _aten.stack.default}  # take no single number of another device


class WrongDevice(RuntimeError):
    """What PyTorch would have refused on a GPU."""


class _Places:
    """Which storages lie on the pretended GPU. A weak reference keeps a storage's address from being given out again."""

    def __init__(self):
        self.there: dict[int, StorageWeakRef] = {}
        self.seen = 0  # tensors that were put there
        self.undetermined: set[str] = set()  # operations that drew random numbers there without a generator
        self.default = False  # where lies what the backward pass makes of nothing
        self.waits: set[str] = set()  # functions of the package in which the host waited for the GPU

    def on_gpu(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self.there

    def put(self, tensor: Tensor, on_gpu: bool) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if on_gpu:
            self.there[storage._cdata] = StorageWeakRef(storage)
            self.seen += 1
            if self.seen % 5000 == 0:
                self.there = {k: w for k, w in self.there.items() if not w.expired()}
        else:
            self.there.pop(storage._cdata, None)

    def wait(self) -> None:
        """Note who waits: the innermost function of the package."""
        frame = sys._getframe(1)
        while frame is not None and OURS not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            self.waits.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")


def _tensors(*trees) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


class _Operations(TorchDispatchMode):
    """Refuses to mix devices; what an operation makes lies where its inputs lie."""

    def __init__(self, places: _Places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = _tensors(args, kwargs)
        on_gpu = [self.places.on_gpu(x) for x in inputs]
        if any(on_gpu):
            self._check(func, args, inputs, on_gpu, kwargs)
            if func in WAIT:
                self.places.wait()
        out = func(*args, **kwargs)
        if func is not _aten.copy_.default and not func._schema.is_mutable:
            known = {x.untyped_storage()._cdata for x in inputs}
            for made in _tensors(out):
                if made.untyped_storage()._cdata not in known:
                    self.places.put(made, any(on_gpu) if inputs else self.places.default)
        return out

    def _check(self, func, args, inputs, on_gpu, kwargs) -> None:
        generator = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)), None)
        if generator is not None:
            raise WrongDevice(f"{func}: a generator of the CPU draws for a tensor on the GPU")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.places.undetermined.add(str(func))
        if func in MAY_MIX or all(on_gpu):
            return
        if func in MAY_INDEX and on_gpu[0] and (len(args) < 3 or self.places.on_gpu(args[2]) or args[2].ndim == 0):
            return
        strict = func in JOIN or (func._schema.is_mutable and not on_gpu[0])
        wrong = [x for x, there in zip(inputs, on_gpu, strict=True) if not there and (strict or x.ndim)]
        if wrong:
            shapes = [(tuple(x.shape), "cuda" if there else "cpu") for x, there in zip(inputs, on_gpu, strict=True)]
            raise WrongDevice(f"{func}: tensors on both devices: {shapes}")


class _Functions(TorchFunctionMode):
    """Turns ``device=`` and ``.to()`` into a note of where a tensor lies, and answers where it does."""

    def __init__(self, places: _Places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and len(args) and isinstance(args[0], Tensor):
            answer = {
                Tensor.device.__get__: lambda there: GPU if there else CPU,
                Tensor.is_cuda.__get__: lambda there: there,
                Tensor.is_cpu.__get__: lambda there: not there,
            }.get(func)
            truth = func(*args, **kwargs)
            if answer is None or truth == torch.device("meta") or args[0].is_meta:
                return truth
            return answer(self.places.on_gpu(args[0]))
        if name in ("numpy", "__array__") and self.places.on_gpu(args[0]):
            raise WrongDevice("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name == "pin_memory":
            if self.places.on_gpu(args[0]):
                raise WrongDevice("cannot pin 'cuda' tensor: only dense CPU tensors can be pinned")
            return args[0].clone()
        if name in ("to", "cpu", "cuda", "type_as") and isinstance(args[0], Tensor):
            return self._move(func, name, args, kwargs)
        given = kwargs.get("device")
        wanted = None if given is None else torch.device(given).type
        if wanted == "cuda":
            kwargs["device"] = CPU
            if isinstance(generator := kwargs.get("generator"), torch.Generator) and generator.device.type == "cpu":
                raise WrongDevice(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
        if name.startswith("new_") and wanted is None and self.places.on_gpu(args[0]):
            wanted = "cuda"
        if wanted == "cuda" and name in ("tensor", "as_tensor", "new_tensor"):
            self.places.wait()  # copied from the host's memory
        with patch.object(self.places, "default", False):
            out = func(*args, **kwargs)
        if wanted in ("cuda", "cpu") and name != "__init__":
            for made in _tensors(out):
                self._put(made, wanted == "cuda", _tensors(args))
        return out

    def _put(self, made: Tensor, on_gpu: bool, sources: list[Tensor]) -> Tensor:
        if any(made.untyped_storage()._cdata == s.untyped_storage()._cdata for s in sources):
            if self.places.on_gpu(made) == on_gpu:
                return made
            made = made.clone()
        self.places.put(made, on_gpu)
        return made

    def _move(self, func, name, args, kwargs):
        tensor, *rest = args
        like = next((x for x in (*rest, kwargs.get("other")) if isinstance(x, Tensor)), None)
        if like is not None:
            wanted, rest, kwargs = self.places.on_gpu(like), [like.dtype], {}
            func = Tensor.to
        elif name in ("cpu", "cuda"):
            wanted, rest, func = name == "cuda", [CPU], Tensor.to
        else:
            given = kwargs.get("device", next((x for x in rest if isinstance(x, str | torch.device)), None))
            wanted = self.places.on_gpu(tensor) if given is None else torch.device(given).type == "cuda"
            if given is not None and torch.device(given).type == "cuda":
                rest = [CPU if isinstance(x, str | torch.device) else x for x in rest]
                kwargs |= {"device": CPU} if "device" in kwargs else {}
        # any other copy waits, in either direction
        pinned = kwargs.get("non_blocking") or (len(rest) > 1 and rest[1] is True)
        ours = OURS in sys._getframe(2).f_code.co_filename  # torch's own stay where they are
        if ours and self.places.on_gpu(tensor) != wanted and not (wanted and pinned):
            self.places.wait()
        out = func(tensor, *rest, **kwargs)
        return out if out.is_meta else self._put(out, wanted, [tensor])


class _Event:
    def __init__(self, **options):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@contextmanager
def a_pretended_gpu() -> Iterator[_Places]:
    """One GPU; yields what is known of the places of tensors."""
    from torch.distributed.checkpoint import filesystem

    places, begin = _Places(), torch.autocast.__init__

    @functools.wraps(begin)
    def autocast(self, device_type, *more, **options):
        begin(self, "cpu" if device_type == "cuda" else device_type, *more, **options)

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *a, **k: True,
        "synchronize": lambda *a: None,
        "current_device": lambda: 0,
        "current_stream": lambda *a: None,
        "set_device": lambda *a: None,
        "device": lambda *a: nullcontext(),
        "get_device_name": lambda *a: "pretended",
        "Event": _Event,
    }
    functions, run = _Functions(places), torch.autograd._engine_run_backward

    def run_backward(outputs, *more, **options):
        """With the mode that torch takes away while a function runs: what is recomputed asks where tensors lie."""
        with functions, patch.object(places, "default", any(map(places.on_gpu, outputs))):
            return run(outputs, *more, **options)

    health = [n for n in vars(torch.optim.Optimizer) if n.endswith("graph_capture_health_check")]
    with (
        patch.multiple(torch.cuda, **fakes),
        patch.multiple(torch.optim.Optimizer, **dict.fromkeys(health, lambda self: None)),
        patch.object(torch.autocast, "__init__", autocast),
        patch.object(torch.autograd, "_engine_run_backward", run_backward),
        patch.object(filesystem, "_OverlappingCpuLoader", lambda resolve, **k: filesystem._SerialCpuLoader(resolve)),
        _Operations(places),
        functions,
    ):
        yield places
