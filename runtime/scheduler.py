"""Decides what the next step runs: any mix of prefill chunks and decodes, of whatever callers there are.

Callers submit jobs and then drive: whoever holds the lock runs one step for everybody, so a stream, a session and a batch in
three threads share their steps. Jobs beyond `max_batch` queue. When blocks run out, the youngest running job gives its own back
and recomputes later from its tokens what the caches have not kept; only a job that is alone and still does not fit fails. A
prompt that begins as another one in the same step waits for its blocks instead of computing them as well.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from oxfuse.runtime.cache_size import blocks_for
from oxfuse.runtime.device import Best
from oxfuse.runtime.engine import Answer, Engine
from oxfuse.runtime.errors import InternalError, UserError
from oxfuse.runtime.sequence import Feed, Rows, TokenSequence, first_wanted

CLOSED = "The model is closed. Load it again with oxfuse.load."


class Job(ABC):
    """Pending tokens of one sequence, and what becomes of their logits.

    `rows` says which logits it wants; `keep` leaves the sequence's blocks in place at the end. The scheduler's lock guards it.
    """

    greedy = False
    """Whether the most likely token is all that it wants; it must then have `receive_best`, and takes logits all the same."""

    def __init__(self, sequence: TokenSequence, *, rows: Rows = "last", keep: bool = False) -> None:
        """Describe the job; `Scheduler.submit` starts it."""
        self.sequence, self.rows, self.keep = sequence, rows, keep
        self.done = False
        self.error: BaseException | None = None
        self.reused = 0
        """Tokens that were in the caches when their turn came, so that they did not run."""
        self.again = False
        """Whether it has lost its blocks, so that tokens which have run once are pending."""

    @abstractmethod
    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        """Take the logits [n, V], float32, of the n tokens at `indices` in the sequence; append tokens to it or set `done`."""

    def receive_best(self, indices: Sequence[int], best: Sequence[Best]) -> None:
        """Do `receive` knowing only the most likely token after each of those at `indices`. Called where `greedy` is set."""
        raise InternalError(f"{type(self).__name__} asked for the most likely tokens and does not take them.")


class _Lock:
    """A lock whose owner, once it is free again, sees to what finalizers left behind because they could not have it."""

    def __init__(self, afterwards: Callable[[], object]) -> None:
        self._lock, self._afterwards = threading.Lock(), afterwards

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._afterwards()

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Hold the lock if nobody does; yield whether that is so."""
        mine = self._lock.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self._lock.release()


class Scheduler:
    """Queue, running jobs and the lock around the engine."""

    def __init__(self, engine: Engine) -> None:
        """Serve jobs with `engine`, which nobody else may use without `lock`."""
        self.engine = engine
        self.lock = _Lock(self._sweep_if_free)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._abandoned: deque[TokenSequence | Job] = deque()
        self._closed = False

    def run(self, jobs: Sequence[Job], on_step: Callable[[], object] | None = None) -> None:
        """Run jobs to their end; `on_step` is called after each step. On any exception none of them is left in the scheduler.

        Raises the error of the first job that failed, UserError after `close`.
        """
        try:
            with self.lock:
                self._open()
                self.waiting += jobs
            while self.advance(lambda: all(job.done for job in jobs)):
                if on_step:
                    on_step()
        finally:
            self.cancel(jobs)
        for job in jobs:
            if job.error is not None:
                raise job.error

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self.lock:
            self._open()
            self.waiting.append(job)

    def advance(self, enough: Callable[[], bool]) -> bool:
        """Run one step unless `enough()`, which is asked under the lock. Return whether a step was run."""
        with self.lock:
            if enough():
                return False
            self._step()
            return True

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take jobs out, finished or not. Blocks they do not keep return to the pool."""
        with self.lock:
            for job in jobs:
                self._retire(job)

    def close(self) -> None:
        """End all jobs with an error and let the engine go; waits for a step that runs."""
        with self.lock:
            self._closed = True
            for job in [*self.running, *self.waiting]:
                self._retire(job, UserError(CLOSED))
            self.engine.close()

    def _open(self) -> None:
        if self._closed:
            raise UserError(CLOSED)

    def abandon(self, item: TokenSequence | Job) -> None:
        """Do `cancel`, or release a sequence, from a finalizer: at once if the lock is free, else as soon as it is.

        A finalizer may run anywhere, also inside a step of this very thread.
        """
        self._abandoned.append(item)
        self._sweep_if_free()

    def _sweep_if_free(self) -> None:
        while self._abandoned:  # again, for what came while the lock was held here
            with self.lock.if_free() as free:
                if not free:
                    return  # who holds it comes here afterwards
                self._sweep()

    def _sweep(self) -> None:
        while self._abandoned:
            item = self._abandoned.popleft()
            if isinstance(item, Job):
                self._retire(item)
            else:
                self.engine.release(item)

    def _retire(self, job: Job, error: BaseException | None = None) -> None:
        job.done, job.error = True, job.error or error
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        if not job.keep:
            self.engine.release(job.sequence)

    def _step(self) -> None:
        self._sweep()
        self._admit()
        plan = self._plan()
        if not plan:
            return
        wanted = [feed.wanted() for feed in plan.values()]
        undelivered = dict.fromkeys(plan)
        try:
            self.engine.enter([*plan.values()])
            results = self.engine.run([*plan.values()])
            for job, indices, answer in zip(plan, wanted, results, strict=True):
                if len(indices):
                    self._deliver(job, indices, answer)
                del undelivered[job]
        except Exception as error:
            for job in undelivered:
                self._retire(job, error)
        except BaseException:  # an interrupt in one caller's thread: the others' tokens become pending again
            for job in undelivered:
                self.engine.release(job.sequence)
                job.again = True
            raise
        finally:
            self.engine.leave()
        self._sweep()

    def _deliver(self, job: Job, indices: Sequence[int], answer: Answer) -> None:
        try:
            if isinstance(answer, Tensor):
                job.receive(indices, answer)
            else:
                job.receive_best(indices, answer)
        except Exception as error:  # it concerns this job alone
            self._retire(job, error)
        if job.done:
            self._retire(job)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.engine.limits.max_batch:
            sequence, size = self.waiting[0].sequence, self.engine.cache.block_size
            first = min(sequence.pending, self.engine.chunk)
            crowded = any(pool.free <= blocks_for(first, size) for pool in self.engine.pools)
            if self.running and crowded:
                return  # it would take blocks from those who run, or be the first to lose its own
            self.running.append(self.waiting.popleft())

    def _plan(self) -> dict[Job, Feed]:
        """Choose the feeds of a step and secure their blocks: decodes first, then prefill chunks, each in order of arrival."""
        engine, plan = self.engine, dict[Job, Feed]()
        budget = engine.limits.max_step_tokens
        coming = set[object]()  # blocks that this step fills
        for job in sorted(self.running, key=lambda job: job.sequence.pending > 1):
            if job not in self.running:
                continue  # lost its blocks to an earlier one
            if not budget:
                break
            if job.sequence.pending > 1:
                found = engine.adopt(job.sequence, first_wanted(job.sequence, job.rows))
                job.reused += 0 if job.again else found
            following = engine.prefixes.next_block(job.sequence)
            end = 0 if following is None else engine.prefixes.end(following)
            if following in coming and first_wanted(job.sequence, job.rows) >= end:
                continue  # the next step finds it
            steps = -(-job.sequence.pending // engine.chunk)  # as alike as can be: a short one would read all weights for little
            count = min(-(-job.sequence.pending // steps), budget)
            while count and not engine.secure(job.sequence, count):
                victim = self.running[-1]
                if victim is not job or len(self.running) > 1:
                    plan.pop(victim, None)
                    self._preempt(victim)
                    if victim is job:
                        break
                else:
                    count //= 2
            if job not in self.running:
                continue
            if not count:
                self._retire(job, self._full(job))
                continue
            plan[job] = Feed(sequence=job.sequence, count=count, rows=job.rows, greedy=job.greedy)
            budget -= count
            if following is not None and job.sequence.cached + count >= end:
                coming.add(following)
        return plan

    def _preempt(self, job: Job) -> None:
        self.engine.release(job.sequence)
        job.again = True
        self.running.remove(job)
        self.waiting.appendleft(job)

    def _full(self, job: Job) -> UserError:
        held = len(job.sequence.tables[0])
        total = self.engine.pools[0].blocks - 1
        return UserError(
            f"The cache is full: a sequence of {len(job.sequence.tokens)} tokens needs more than the {held} of {total} blocks "
            f"({self.engine.cache.block_size} tokens each) that it has, and open sessions hold the rest. Close sessions, or load "
            "with a larger cache_bytes."
        )
