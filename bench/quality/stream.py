# SPDX-License-Identifier: Apache-2.0
"""Endless random edits with their token ids, drawn by worker processes while the device trains."""

from itertools import chain

import torch
from scenes import TASKS, Edits, sample
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class _Endless(IterableDataset):
    def __init__(self, seed, chunk, shares, every_pairing, encoder):
        self.seed, self.chunk, self.shares, self.every_pairing = seed, chunk, shares, every_pairing
        self.encoder = encoder

    def __iter__(self):
        torch.set_num_threads(1)
        worker = get_worker_info()
        generator = torch.Generator().manual_seed(self.seed * 1000 + (worker.id if worker else 0))
        encoder = self.encoder() if self.encoder else lambda *_: ()
        while True:
            tasks = None
            if self.shares is not None:
                tasks = torch.multinomial(torch.tensor(self.shares), self.chunk, replacement=True, generator=generator)
            edits = sample(self.chunk, generator, tasks=tasks, every_pairing=self.every_pairing)
            style = torch.rand((self.chunk, 2), generator=generator) < torch.tensor([0.3, 0.2])
            texts = getattr(edits, encoder.texts)() if self.encoder else edits.instructions()
            ids = [[i for t in each for i in chain(*encoder(t, *flags))] for each, flags in zip(texts, style.tolist())]
            yield {**vars(edits), "ids": torch.tensor(ids, dtype=torch.int32)}


class EditStream:
    """take(n) -> (Edits of n, ids int32 [n, K]), all on the CPU.

    chunk: how many are drawn at once; workers: processes (0: this one); shares: of TASKS, or None for the usual ones;
    every_pairing: the held-out pairings too; encoder: a class of text.py whose ids, end to end, are wanted (none: K 0),
    of all texts that an edit has there.
    """

    def __init__(self, seed, chunk, workers, shares=None, every_pairing=False, encoder=None):
        if shares is not None:
            shares = [*shares, *[0.0] * (len(TASKS) - len(shares))]
        loader = DataLoader(
            _Endless(seed, chunk, shares, every_pairing, encoder),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
        )
        self._chunks, self._rest, self._have = iter(loader), [], 0

    def take(self, n):
        while self._have < n:
            chunk = next(self._chunks)
            self._rest.append(chunk)
            self._have += len(chunk["task"])
        joined = (
            {name: torch.cat([c[name] for c in self._rest]) for name in self._rest[0]}
            if len(self._rest) > 1
            else self._rest[0]
        )
        self._have -= n
        self._rest = [{name: value[n:] for name, value in joined.items()}] if self._have else []
        taken = {name: value[:n] for name, value in joined.items()}
        ids = taken.pop("ids")
        return Edits(**taken), ids
