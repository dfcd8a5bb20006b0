"""Adds up a pass, recording by recording, in the order of the stream: memory is that of a few recordings."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchtitan.data.tokens import bos_token, largest_count
from torchtitan.evaluation.passes import Pass
from torchtitan.evaluation.recording import NUM_EDGES, Piece, RecordingScore, Sums, score_recording
from torchtitan.evaluation.scoring import WindowScore
from torchtitan.logging import logger


class Session(NamedTuple):
    """Recordings are of one where all of these columns are the same."""

    source_dataset: str
    subject_id: str
    session_id: str


@dataclass
class Totals:
    """A whole pass.

    Attributes:
        sessions: sums of each session, in the order of the data.
        by_position, by_time: see `RecordingScore`.
        expected, observed: how often each count should have occurred by the model, and how often it did, float64 and
            int64 [vocab_size - 1].
    """

    expected: NDArray[np.float64]
    observed: NDArray[np.int64]
    sessions: dict[Session, Sums] = field(default_factory=dict)
    by_position: NDArray[np.float64] = field(default_factory=lambda: np.zeros((NUM_EDGES, 4)))
    by_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros((NUM_EDGES, 4)))

    @property
    def overall(self) -> Sums:
        """All sessions together."""
        overall = Sums()
        for sums in self.sessions.values():
            overall += sums
        return overall

    @property
    def sources(self) -> dict[str, Sums]:
        """The sums of each source dataset."""
        sources: dict[str, Sums] = {}
        for session, sums in self.sessions.items():
            sources.setdefault(session.source_dataset, Sums())
            sources[session.source_dataset] += sums
        return sources


def warn_of_clipped(sums: Sums, vocab_size: int) -> None:
    """Says how many of the scored counts are not the recorded ones, if any."""
    if sums.clipped:
        logger.warning(
            f"{sums.clipped:,} of {sums.tokens:,} scored counts were clipped to {largest_count(vocab_size)}, the "
            f"largest with training.vocab_size = {vocab_size}; nulls are of the clipped counts, too"
        )


class Accumulator:
    """Takes the windows of a pass in order. Recordings that are complete are worked on by threads, a few at a time."""

    def __init__(self, over: Pass, *, nulls: bool = True, document_mask: bool = False, num_threads: int = 1) -> None:
        """`nulls`: see `score_recording`; `document_mask`: the model has seen of each recording nothing before it."""
        self.over, self.nulls, self.document_mask = over, nulls, document_mask
        self.ids = over.windows.recordings.ids()
        self.bos = bos_token(over.windows.vocab_size)
        self.totals = Totals(np.zeros(self.bos), np.zeros(self.bos, np.int64))
        self.pool = ThreadPoolExecutor(num_threads)
        self.at_most = 2 * num_threads
        self.under_way: deque[tuple[int, Future[RecordingScore]]] = deque()
        self.recording = -1  # the one that is open
        self.pieces: list[Piece] = []

    def add(self, score: WindowScore) -> None:
        """Takes the next window."""
        windows, totals = self.over.windows, self.totals
        start, stop = self.over.scored(score.window)
        totals.expected += score.expected
        totals.observed += np.bincount(score.labels, minlength=self.bos + 1)[: self.bos]
        done = 0
        for recording, first, length in windows.pieces(start, stop):
            if recording != self.recording:
                self._close()
                self.recording = recording
            part = slice(done, done + length)
            position = start + done - score.window * windows.stride - 1
            if self.document_mask:
                position = min(position, first - 1)
            self.pieces.append(Piece(first, position, score.labels[part], score.nats[part], score.rates[part]))
            done += length

    def finish(self) -> Totals:
        """The sums, when all windows have been taken."""
        self._close()
        self._take(0)
        self.pool.shutdown()
        return self.totals

    def _close(self) -> None:
        """Gives the open recording, if there is one, to a thread; waits where too many are under way."""
        if self.pieces:
            windows, index = self.over.windows, self.over.windows.index
            row, neurons, bins = (int(column[self.recording]) for column in (index.rows, index.neurons, index.bins))
            recorded = windows.recordings.spike_counts(row, neurons, bins)
            clipped = recorded if recorded.max() > largest_count(windows.vocab_size) else None
            scored = self.pool.submit(score_recording, neurons, self.pieces, nulls=self.nulls, recorded=clipped)
            self.under_way.append((self.recording, scored))
            self.pieces = []
            self._take(self.at_most)

    def _take(self, left: int) -> None:
        """Adds up the oldest recordings until no more than `left` are under way: always in the same order."""
        while len(self.under_way) > left:
            recording, scored = self.under_way.popleft()
            score = scored.result()
            row = int(self.over.windows.index.rows[recording])
            session = Session(*(self.ids[column][row] for column in Session._fields))
            self.totals.sessions.setdefault(session, Sums())
            self.totals.sessions[session] += score.sums
            self.totals.by_position += score.by_position
            self.totals.by_time += score.by_time
