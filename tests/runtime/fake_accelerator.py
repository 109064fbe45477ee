"""The CPU in a GPU's place, as strict: a record keeps its addresses, new memory is garbage, an upload ends when waited for.

And the toy model's decode program, which refuses whatever its contract forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from oxfuse.runtime.accelerator import Accelerator, Captured, DeviceMemory
from oxfuse.runtime.cache_size import blocks_for
from oxfuse.runtime.device import Outcome, Step
from oxfuse.runtime.graphs import GraphDevice
from oxfuse.runtime.memory_plan import Room
from oxfuse.runtime.sequence import Feed
from oxfuse.runtime.step_inputs import flat_inputs

from .toy import VOCAB, ToyModel


class FakeAccelerator(Accelerator):
    """Counts what is asked of it. `phase` tells a program how it is being run."""

    def __init__(self, free: int = 8 << 30) -> None:
        self.device = torch.device("cpu")
        self.free, self.phase = free, "idle"
        self.records = self.replays = self.uploads = self.synchronized = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        before, self.phase = self.phase, "run" if self.phase == "idle" else self.phase
        try:
            yield
        finally:
            self.phase = before

    def stream(self) -> int:
        assert self.phase != "idle", "used outside of active()"
        return 0

    def synchronize(self) -> None:
        assert self.phase != "record", "a recording must not wait"
        self.synchronized += 1

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), 77, dtype=dtype)

    def capture(self, work: Callable[[], object]) -> Captured:
        assert self.phase == "run", "a recording inside of another, or outside of active()"
        self.records, self.phase = self.records + 1, "record"
        try:
            work()
        finally:
            self.phase = "run"
        return _Again(self, work)

    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self.uploads += 1
        done = False

        def copy() -> None:
            nonlocal done
            if not done:
                target.copy_(source)
                done = True

        return copy

    def room(self) -> Room:
        return Room(device="cuda:0, a fake, sm_90", free=self.free, total=80 << 30)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(allocated=123456, peak=234567, reserved=345678)


class _Again(Captured):
    """Does the recorded work once more."""

    def __init__(self, accelerator: FakeAccelerator, work: Callable[[], object]) -> None:
        self._accelerator, self._work = accelerator, work

    def replay(self) -> None:
        accelerator = self._accelerator
        assert accelerator.phase == "run", "a replay outside of active()"
        accelerator.replays, accelerator.phase = accelerator.replays + 1, "replay"
        try:
            self._work()
        finally:
            accelerator.phase = "run"


class ToyDecode:
    """The toy model for one token of each sequence. Rows of padding give NaN; addresses must be those of the recording."""

    def __init__(self, toy: ToyModel, accelerator: FakeAccelerator) -> None:
        self.toy, self.accelerator = toy, accelerator
        self.batches: list[tuple[int, int]] = []
        """Rows and live rows of each replay."""
        self.feeds: Sequence[Feed] | None = None
        """What the step at hand is run for."""
        self._addresses: dict[int, list[int]] = {}

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        (tokens, positions, starts, kv_lens, slots, tables, rows), caches = inputs[:7], inputs[7:]
        size, phase = len(tokens), self.accelerator.phase
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in inputs), "a program copies such an input"
        assert starts.tolist() == [*range(size + 1)] and rows.tolist() == [*range(size)]
        addresses = [t.data_ptr() for t in inputs]
        if phase == "record":
            assert size not in self._addresses, "a batch size was recorded twice"
            self._addresses[size] = addresses
        elif phase == "replay":
            assert self._addresses[size] == addresses, "an input has moved since it was recorded"
        live = int((kv_lens > 0).sum())
        pads = slice(live, None)
        assert (kv_lens[:live] > 0).all(), "padding between live rows"
        assert not tokens[pads].any() and not positions[pads].any() and not tables[:, pads].any(), "padding that is none"
        assert (slots[:, pads] == -1).all(), "a slot in a row of padding"
        logits = torch.full((size, VOCAB), torch.nan)
        if phase == "replay":
            self.batches.append((size, live))
            if self.feeds is not None:
                self._compare(self.feeds, [tokens, positions, starts, kv_lens, slots, tables, rows], live)
        if live:
            part = [tokens[:live], positions[:live], starts[: live + 1], kv_lens[:live], slots[:, :live], tables[:, :live]]
            logits[:live] = self.toy.step([*(t.contiguous() for t in part), rows[:live], *caches])
        return logits

    def _compare(self, feeds: Sequence[Feed], found: list[Tensor], live: int) -> None:
        """Compare with what a step without padding would be given: the tables' rows in full, too."""
        block_size = 4
        expected = flat_inputs(feeds, [*range(len(feeds))], block_size)
        assert live == len(feeds), "not the rows of this step"
        tables = found[5][:, :live]
        width = expected[5].shape[2]
        cut = [found[0][:live], found[1][:live], found[2][: live + 1], found[3][:live], found[4][:, :live]]
        assert all(a.tolist() == b.tolist() for a, b in zip(cut, expected, strict=False)), "inputs that are not the feeds'"
        held = [[len(table) for table in feed.sequence.tables] for feed in feeds]
        assert tables[:, :, :width].tolist() == expected[5].tolist(), "old tables"
        assert not tables[:, :, max(map(max, held)) :].any(), "old entries behind a table's end"


class CheckedDevice(GraphDevice):
    """Tells the decode program what it is about to be run for."""

    def run(self, step: Step, feeds: Sequence[Feed], rows: Sequence[int], caches: Sequence[Tensor], *, greedy: bool) -> Outcome:
        assert isinstance(self._decode, ToyDecode)
        self._decode.feeds = feeds
        try:
            return super().run(step, feeds, rows, caches, greedy=greedy)
        finally:
            self._decode.feeds = None


def toy_device(toy: ToyModel, *, most: int, max_context: int = 96, most_rows: int | None = None) -> CheckedDevice:
    """A device whose decode program is `toy`, for batches of up to `most`; block size 4 as in `toy_engine`."""
    accelerator = FakeAccelerator()
    decode = ToyDecode(toy, accelerator)
    device = CheckedDevice(accelerator, decode=decode, most=most, table=blocks_for(max_context, 4))
    if most_rows:
        device.most_rows = most_rows
    return device
