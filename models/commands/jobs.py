"""The runs of one call of `models.sample`: which prompts with which seed, and how their folders are named."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.pipeline.embeddings import Embeddings
from models.schedulers.seeds import check_seed

MOST = 10_000
"""Runs of one call."""
_RANGE = re.compile(r"(\d+)-(\d+)", re.ASCII)
_NAME = 40
"""Characters of a prompt in the name of a folder."""


@dataclass(frozen=True)
class Texts:
    """What was given to be encoded."""

    batches: list[list[str]]
    """Prompts that are sampled at once."""
    negative: str | None = None
    image: Path | None = None
    last_image: Path | None = None


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    """Of its folder in OUT; "": OUT itself, of a single run."""
    prompts: list[str]
    embeddings: Embeddings
    seed: int
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of what comes after sampling."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}: " if self.name else ""


def parse_seeds(given: list[str] | None) -> list[int]:
    """Of "7" or "0-3", both ends included, each; [0] of none. Raises ValueError for what is no seed, or given twice."""
    seeds: list[int] = []
    for text in given or ["0"]:
        if match := _RANGE.fullmatch(text):
            first, last = map(check_seed, map(int, match.groups()))
            if last < first or last - first >= MOST:
                raise ValueError(f"--seed {text}: a range goes up, by fewer than {MOST}, such as 0-3")
            seeds += range(first, last + 1)
        elif re.fullmatch(r"-?\d+", text, re.ASCII):
            seeds.append(check_seed(int(text)))
        else:
            raise ValueError(f"--seed {text} is neither a whole number nor a range such as 0-3")
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(f"--seed {twice[0]} is given twice; give it once")
    return seeds


def make_jobs(batches: list[tuple[list[str], Embeddings]], seeds: Sequence[int]) -> list[Job]:
    """A run for each batch of prompts and each seed. ValueError for more than `MOST`."""
    if len(batches) * len(seeds) > MOST:
        raise ValueError(f"{len(batches)} prompts with {len(seeds)} seeds are more than {MOST} runs; give fewer")
    digits = max(2, len(str(len(batches))))
    jobs = []
    for number, (prompts, embeddings) in enumerate(batches, 1):
        for seed in seeds:
            parts = [f"{number:0{digits}d}", *_slug(prompts[0])] if len(batches) > 1 else []
            parts += [f"seed-{seed}"] if len(seeds) > 1 else []
            jobs.append(Job("-".join(parts), prompts, embeddings, seed))
    return jobs


def of_each_batch(jobs: list[Job]) -> list[Job]:
    """The first run of each batch of prompts."""
    return list({id(job.embeddings): job for job in reversed(jobs)}.values())[::-1]


def _slug(prompt: str) -> list[str]:
    """A prompt in a file's name: its ASCII words, as many as fit; [] if there is none."""
    words, length = [], 0
    for word in re.findall(r"[a-z0-9]+", prompt.lower()):
        length += len(word) + 1
        if length > _NAME + 1:
            break
        words.append(word)
    return words


def split(embeddings: Embeddings, batches: list[list[str]]) -> list[tuple[list[str], Embeddings]]:
    """Each batch of prompts with its part of the embeddings of them all, which lie one behind the other."""
    parts, begin = [], 0
    for prompts in batches:
        end = begin + len(prompts)
        parts.append((prompts, {name: x[begin:end] for name, x in embeddings.items()}))
        begin = end
    return parts
