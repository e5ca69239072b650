"""Where blocks are worked on: threads of this process, processes, or a Dask cluster, used in one way.

Processes and clusters are those of `distributed`, which gives what a lost worker had in hand to another one.
"""

import concurrent.futures
import logging
import re
import time
from asyncio import CancelledError as TaskCancelledError
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Protocol

from wsipipe.device import usable_cpus
from wsipipe.errors import ConfigError, StoreError, WsipipeError, one_line

log = logging.getLogger(__name__)

ADDRESS = r"(tcp|tls|ucx)://[^/\s]+:\d{1,5}|inproc://\S+"  # of a scheduler; the last of one in this process
AHEAD = 2  # blocks handed out for each at work: none waits for the next, and what is not yet stored stays little
ANSWER_S = 20.0  # a scheduler that is there answers within a second
PATIENCE_S = 300.0  # without a single worker; batch systems take their time to start one


class _Pool(Protocol):
    """Where functions are called; `name` is for messages."""

    name: str

    def parallel(self) -> int:
        """How many calls are worked on at once."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A future of the call."""

    def first_done(self, futures: Iterable[Any]) -> Iterable[Any]:
        """Wait for one at least."""

    def cancel(self, futures: Iterable[Any]) -> None:
        """Drop the calls that have not begun."""


class Workers:
    """Calls a function for many blocks; made by `hired`."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool

    def results(
        self, function: Callable[..., Any], calls: Iterable[tuple[int, tuple[Any, ...]]]
    ) -> Iterator[tuple[int, Any]]:
        """Results of `function` as they come, each with the block that it is of.

        `calls` are blocks with the arguments for each. They are taken as room comes free, so that few are under way at
        a time however many there are, and no worker waits for the slowest of a group.

        Raises
        ------
        WsipipeError
            If a block cannot be made, because of what it reads or because its workers were lost; names the block.
        Exception
            Any other that the function raised, with a note of the block.
        """
        todo = iter(calls)
        under_way: dict[Any, int] = {}
        try:
            while True:
                room = AHEAD * self._pool.parallel() - len(under_way)
                for block, arguments in islice(todo, max(0, room)):
                    under_way[self._pool.submit(function, *arguments)] = block
                if not under_way:
                    return
                for future in self._pool.first_done(list(under_way)):
                    block = under_way.pop(future)
                    try:
                        result = _result(future, block)
                    except (CancelledError, TaskCancelledError) as error:  # nobody here cancels what he waits for
                        raise _gone(self._pool.name) from error
                    yield block, result
        finally:
            self._pool.cancel(list(under_way))


def _result(future: Any, block: int) -> Any:
    try:
        return future.result()
    except WsipipeError as error:
        raise type(error)(f"block {block}: {error}") from error
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # not by its type, which would load distributed for threads
            raise StoreError(
                f"block {block} was given up, its workers were lost again and again, perhaps for want of memory: "
                "run the same command again to go on, with fewer --workers or more memory for each"
            ) from error
        error.add_note(f"in block {block}")
        raise


def require_scheduler(scheduler: str, workers: int | None) -> None:
    """Raise ConfigError for arguments of `hired` that can mean nothing; asks no scheduler."""
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers do nothing; give at least 1")
    if scheduler not in ("threads", "processes") and not re.fullmatch(ADDRESS, scheduler):
        raise ConfigError(f"--scheduler {scheduler} is none of threads, processes, tcp://HOST:PORT")


@contextmanager
def hired(scheduler: str, workers: int | None) -> Iterator[Workers]:
    """Workers for as long as the context lasts.

    Parameters
    ----------
    scheduler : str
        "threads", "processes", or the address of a `distributed` scheduler whose workers see the same files.
    workers : int, optional
        Threads or processes; by default the usable CPUs. Without meaning for a cluster, which has those that it has.

    Raises
    ------
    ConfigError
        If there is no such scheduler, or it does not answer.
    """
    require_scheduler(scheduler, workers)
    count = usable_cpus() if workers is None else workers
    with ExitStack() as stack:
        if scheduler == "threads":
            yield Workers(_Threads(stack.enter_context(concurrent.futures.ThreadPoolExecutor(count)), count))
            return
        from distributed import Client, LocalCluster

        if scheduler == "processes":
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                memory_limit=None,  # a block's memory is bounded; to pause or kill for it would only lose time
                dashboard_address=None,
                silence_logs=logging.ERROR,
            )
            address = stack.enter_context(cluster).scheduler_address
        else:
            address = scheduler
        try:
            client = Client(address, timeout=ANSWER_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"no Dask scheduler answers at {scheduler} ({one_line(error)}); check the address"
            ) from error
        yield Workers(_Cluster(stack.enter_context(client), scheduler))


class _Threads:
    def __init__(self, pool: concurrent.futures.ThreadPoolExecutor, count: int) -> None:
        self._pool, self._count, self.name = pool, count, "threads"

    def parallel(self) -> int:
        return self._count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments)

    def first_done(self, futures: Iterable[Any]) -> Iterable[Any]:
        return concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED).done

    def cancel(self, futures: Iterable[Any]) -> None:
        for future in futures:
            future.cancel()


class _Cluster:
    """A cluster of `distributed`, whose workers may come and go."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self.name = client, name

    def parallel(self) -> int:
        return max(1, self._threads())

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._client.submit(function, *arguments, pure=False)

    def first_done(self, futures: Iterable[Any]) -> Iterable[Any]:
        from distributed import wait

        manned = time.monotonic()  # when somebody was last seen at work
        while True:
            try:
                with self._client.as_current():
                    done: Iterable[Any] = wait(futures, timeout=ANSWER_S, return_when="FIRST_COMPLETED").done
                return done
            except TimeoutError:
                now = time.monotonic()
                if self._threads():
                    manned = now
                elif now - manned < PATIENCE_S:
                    log.warning("the Dask scheduler at %s has no worker; waiting for one", self.name)
                else:
                    raise StoreError(
                        f"the Dask scheduler at {self.name} has had no worker for {PATIENCE_S:.0f} s; "
                        "start workers and run the same command again to go on"
                    ) from None
            except (CancelledError, TaskCancelledError) as error:
                raise _gone(self.name) from error

    def cancel(self, futures: Iterable[Any]) -> None:
        if self._client.status == "running":
            self._client.cancel(list(futures))

    def _threads(self) -> int:
        if self._client.status != "running":
            raise _gone(self.name)
        try:
            return sum(self._client.nthreads().values())
        except OSError as error:
            raise _gone(self.name) from error


def _gone(name: str) -> StoreError:
    return StoreError(f"the Dask scheduler at {name} is gone; start it and run the same command again to go on")
