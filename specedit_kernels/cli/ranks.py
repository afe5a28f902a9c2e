# SPDX-License-Identifier: Apache-2.0
"""One folder's pictures on several processes (`torchrun`): who edits which, what all of them found, who has died.

They meet in torch.distributed's store alone: no rank waits for another before the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from .text import UserError, one_line, say

# Seconds between two signs of life, after how many without one a rank is taken for dead, and how long it may take until
# it gives the first. A thread of its own gives them: a long step, or loading a model, does not hold them up.
BEAT, PATIENCE, START = 0.5, 30.0, 300.0


def several() -> bool:
    """Whether this process is one of several that a launcher (torchrun, accelerate launch) has started."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


class Share:
    """This process's part of a run.

    store: of torch.distributed, one for all. Within the context the rank gives signs of life and looks for the others';
    where one has died the run ends: one line on stderr names it, and every process has the exit code 1.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        # (what was read last, when) of each other rank
        self._seen: dict[int, tuple[bytes, float]] = {}

    @classmethod
    def of_environment(cls) -> Share:
        """By a launcher's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). UserError without them."""
        from datetime import timedelta

        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=START)))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"several processes: {str(error).splitlines()[0]}") from None
        return cls(PrefixStore("specedit", store), rank, size)

    # what the ranks tell each other; nothing waits within the store, whose lock the signs of life need too

    def _get(self, key: str) -> bytes | None:
        return self.store.get(key) if self.store.check([key]) else None

    def _wait(self, key: str, rank: int) -> bytes:
        """What a rank tells; one that has left without it has said why."""
        while (found := self._get(key)) is None:
            if self.store.check([f"left {rank}"]) and not self.store.check([key]):
                raise SystemExit(1)
            time.sleep(BEAT / 10)
        return found

    def agree(self, value: Any) -> Any:
        """The first rank's value, on all of them. Once a run."""
        if self.rank == 0:
            self.store.set("agreed", json.dumps(value))
        return json.loads(self._wait("agreed", 0))

    def take(self, count: int) -> Iterator[int]:
        """The next number under `count` that no rank has taken, as long as there is one."""
        while (number := self.store.add("taken", 1) - 1) < count:
            yield number

    def gather(self, outcome: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """What each rank gives, on the first; None on the others. Once a run, at its end."""
        self.store.set(f"outcome {self.rank}", json.dumps(outcome))
        if self.rank:
            return None
        return [json.loads(self._wait(f"outcome {rank}", rank)) for rank in range(self.size)]

    def say_once(self, text: str) -> None:
        """On stderr, by the first rank that has the same to say."""
        if self.store.add(f"said {text}", 1) == 1:
            say(text, sys.stderr)

    # who lives

    def __enter__(self) -> Share:
        self._thread.start()
        self._before = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, self._before)
        with contextlib.suppress(RuntimeError):  # a store whose process has ended
            if isinstance(error, UserError):
                self.say_once(f"specedit: {one_line(str(error))}")
            elif error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt)):
                self.say_once(f"specedit: rank {self.rank}: {kind.__name__}: {one_line(str(error))}")
            self.store.set(f"left {self.rank}", "yes")

    def _terminated(self, signum: int, frame: Any) -> None:
        """A launcher ends all where one has died, sooner than signs of life are missed."""
        self._stop.set()
        self.store.set(f"left {self.rank}", "yes")
        until = time.monotonic() + 4 * BEAT
        self._look()
        before = dict(self._seen)
        while time.monotonic() < until:
            time.sleep(BEAT / 5)
            self._look()
        dead = [rank for rank in self._others() if self._seen.get(rank) == before.get(rank)]
        if dead:
            self._say_dead(dead[0])
        os._exit(1)  # an exception could be caught by whatever runs just now

    def _others(self) -> list[int]:
        """Ranks that have not left by themselves."""
        return [r for r in range(self.size) if r != self.rank and not self.store.check([f"left {r}"])]

    def _look(self) -> None:
        for rank in self._others():
            found = self._get(f"alive {rank}") or b""
            if found != self._seen.get(rank, (None, 0.0))[0]:
                self._seen[rank] = found, time.monotonic()

    def _say_dead(self, rank: int) -> None:
        if self.store.add("dead", 1) == 1:
            say(f"specedit: rank {rank} of {self.size} has died; what was finished is kept, the same command goes on"
                " from there", sys.stderr)  # fmt: skip

    def _watch(self) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                self.store.set(f"alive {self.rank}", str(number))
                self._look()
                for rank in self._others():
                    found, at = self._seen[rank]
                    if time.monotonic() - at > (PATIENCE if found else START):
                        self._say_dead(rank)
                        os._exit(1)
                self._stop.wait(BEAT)
        except RuntimeError:  # of the store: without a launcher's, it is the first rank's
            if not self._stop.is_set():
                say(f"specedit: rank {self.rank}: rank 0 has died: its store does not answer", sys.stderr)
                os._exit(1)
