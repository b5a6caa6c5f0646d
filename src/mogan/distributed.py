"""Many processes, one run: who they are, what they tell each other, what happens when one of them fails.

Everything is torch's own. ``torchrun``, ``accelerate launch`` and ``srun`` say through the environment which process this
is; without any of them a :class:`World` is one process and nothing here does anything.
"""

import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from mogan.devices import choose_device
from mogan.errors import UserError

PATIENCE = timedelta(minutes=30)  # a process that keeps the others waiting longer than this is taken for dead
# words of an error that a peer's end causes
LOST = ("gloo", "NCCL", "onnection closed", "onnection reset", "roken pipe")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: where this process computes.
        rank: this process, from 0.
        ranks: how many there are.
        mesh: over what networks are sharded; None for a process alone.
        sequence: the processes that work on one sample together, each on its part of the tokens; None if each works alone.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None
    sequence: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """True for the one process that writes logs and samples."""
        return self.rank == 0

    @property
    def copies(self) -> int:
        """How many copies there are of every sharded network (HSDP)."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim == 2 else 1

    @property
    def shares(self) -> int:
        """How many shares a batch is cut into."""
        return self.ranks // (self.sequence.size() if self.sequence else 1)

    @property
    def share(self) -> int:
        """Which of them is ours; processes that work on the same samples have the same one."""
        return self.rank // (self.sequence.size() if self.sequence else 1)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """True on every process if it is on one."""
        if self.mesh is None:
            return flag
        seen = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen)

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum of a tensor of any shape over the processes."""
        if self.mesh is None:
            return value
        found = value.clone()
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    def average(self, value: Tensor) -> Tensor:
        """A tensor of any shape averaged over the processes."""
        if self.mesh is None:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.ranks

    def mean(self, scalars: Sequence[Tensor]) -> list[float]:
        """Scalars averaged over the processes, which must all have as many; the host waits for them."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in scalars])
        return self.average(values).tolist()

    def rows(self, mine: Tensor) -> Tensor:
        """The rows of every process, ``(N, ...)`` each, in their order, on each of them: ``(ranks N, ...)``."""
        if self.mesh is None:
            return mine
        found = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(found, mine.contiguous())
        return torch.cat(found)

    def samples(self, mine: Tensor) -> Tensor:
        """:meth:`rows` of the batch, ``(B, ...)``: once, where several processes work on the same samples."""
        return self.rows(mine).unflatten(0, (self.shares, -1, len(mine)))[:, 0].flatten(0, 1)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order, on each of them."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def from_main(self, compute: Callable[[], Any]) -> Any:
        """``compute()`` of process 0, given to all: what is too large to hold once per process."""
        if self.mesh is None:
            return compute()
        box = [compute() if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ONE = World(torch.device("cpu"))  # a process alone


@contextmanager
def join(device: str = "auto", replicas: int = 1, context: int = 1) -> Iterator[World]:
    """Join the other processes, if this one was started with any; leave them, or end with them, when the block ends.

    The first process that fails says why; the others, which then lose it, end without a word. A process that is killed
    cannot say anything: then another one says that it is gone.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        replicas: copies of every sharded network (HSDP); 1 shards over all processes.
        context: processes that share the tokens of one sample; 1 gives each its own samples.

    Raises:
        UserError: the processes are too few, cannot be divided so, or did not find each other.
    """
    _read_slurm()
    ranks = _number("WORLD_SIZE", 1)
    if ranks == 1:
        if replicas != 1 or context != 1:
            raise UserError("--hsdp and --context-parallel need several processes: start them with torchrun")
        yield World(choose_device(device))
        return
    for option, count in (("--hsdp", replicas), ("--context-parallel", context)):
        if count < 1 or ranks % count:
            raise UserError(f"{option} {count} does not divide the {ranks} processes")
    if replicas == ranks and context > 1:
        raise UserError(
            f"--hsdp {replicas} gives each process a whole copy, and --context-parallel {context} has several work on one sample: "
            "give --hsdp fewer"
        )
    if ":" in device:
        raise UserError(
            f"--device {device} names one GPU for {ranks} processes: give --device cuda, and each takes its own"
        )
    where = choose_device(device, _number("LOCAL_RANK", 0))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        shared = dist.PrefixStore("mogan", store)
        dist.init_process_group(backend, store=shared, rank=rank, world_size=ranks, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the {ranks} processes did not find each other ({error}): start all of them with one torchrun or srun, and "
            "let MASTER_ADDR name the first machine"
        ) from error
    mesh, sequence = _meshes(where.type, ranks, replicas, context)
    # FSDP2 warns of in-place arithmetic on what a network returns: there is none here
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    try:
        yield World(where, rank, ranks, mesh, sequence)
    except Exception as error:
        ending = _first_error(error, store, rank, ranks)
        if ending is error:
            raise
        raise ending from error
    dist.destroy_process_group()


def _meshes(kind: str, ranks: int, replicas: int, context: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Over what networks are sharded, and the neighbours (on one machine) that work on one sample."""
    if replicas == 1:
        mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
    if context == 1:
        return mesh, None
    every = init_device_mesh(kind, (ranks // context, 1, context), mesh_dim_names=("share", "ring", "ulysses"))
    return mesh, every["ring", "ulysses"]


def _number(name: str, usual: int) -> int:
    """What a launcher says in a variable of the environment."""
    said = os.environ.get(name, str(usual))
    try:
        return int(said)
    except ValueError as error:
        raise UserError(f"{name} is {said!r} in the environment, where launchers put a number: unset it") from error


def _read_slurm() -> None:
    """``srun`` says who a process is in words of its own."""
    if "RANK" in os.environ or _number("SLURM_NTASKS", 1) == 1:
        return
    if any(name not in os.environ for name in SLURM.values()):
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            "under srun MASTER_ADDR must name the first machine: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    os.environ.update({name: os.environ[slurm] for name, slurm in SLURM.items()})
    os.environ.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 10000))


def _first_error(error: Exception, store: dist.Store, rank: int, ranks: int) -> BaseException:
    """What this process should end with: its error if it is the first to fail, silence otherwise."""
    text = "".join(traceback.format_exception_only(error))
    lost = not isinstance(error, UserError) and any(word in text for word in LOST)
    if lost:
        error = UserError(
            f"process {rank} of {ranks} lost another one, which was killed (for memory?) or cut off; the same command goes "
            f"on from the last checkpoint ({text.split(' This is typically')[0].strip()})"
        )
    try:
        first = int(store.compare_set("mogan-first-error", "", str(rank))) == rank
        ended = store.add("mogan-ended", 1)
        hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        end = time.monotonic() + 5
        while hosts_store and not lost and ended < ranks and time.monotonic() < end:
            time.sleep(0.05)  # the others cannot ask who was first once the store is gone
            ended = store.add("mogan-ended", 0)
    except (dist.DistError, RuntimeError):  # the store ended with process 0, which may have been killed
        first = True
    if not first:
        return SystemExit(2)
    if not lost:
        get_error_handler().record_exception(error)  # torchrun's summary shows it
    return error
