"""A long load on the engine, and one long text: nothing is lost, nothing is mixed, and memory stays where it was.

python -m tests.generation.soak                                     10,000 requests, then 1,000,000 tokens in one text
python -m tests.generation.soak --requests 300 --tokens 20000       a glimpse
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import Counter
from pathlib import Path

import torch

from selective_ssm.generation import Engine, Request, stream
from selective_ssm.models import LanguageModel, LanguageModelConfig

SLOTS = 16
PROMPTS = 50
LONGEST = 256
SLACK = 16 * 2**20
"""By how many bytes memory may differ; to have lost 20 a token would be more."""


def main() -> None:
    """Run both, and print a line of figures for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257, tie_embeddings=False)).eval()
    requests(model.double(), options.requests)
    one_text(model.float(), options.tokens)


def requests(model: LanguageModel, count: int) -> None:
    """Many texts of mixed lengths, some called off, some with a deadline; in float64 a batch changes nothing."""
    draw = random.Random(0)
    prompts = [[draw.randrange(257) for _ in range(draw.randint(1, LONGEST))] for _ in range(PROMPTS)]
    alone = [
        Engine(model, slots=1).submit(ids, max_new_tokens=LONGEST, seed=i).result().ids for i, ids in enumerate(prompts)
    ]
    engine = Engine(model, slots=SLOTS, prefix_bytes=1 << 20, run_ahead=True)
    waiting: list[tuple[Request, int, int]] = []
    ends: Counter[str] = Counter()
    began, first_memory = time.perf_counter(), 0
    for number in range(count):
        place, length = draw.randrange(PROMPTS), draw.randint(1, LONGEST)
        deadline = draw.uniform(0, 0.5) if draw.random() < 0.1 else None
        request = engine.submit(prompts[place], max_new_tokens=length, seed=place, deadline=deadline)
        waiting.append((request, place, length))
        while len(waiting) >= 4 * SLOTS:
            engine.step()
            if draw.random() < 0.01:
                draw.choice(waiting)[0].cancel()
            for entry in [entry for entry in waiting if entry[0].is_done]:
                ends[checked(*entry, alone)] += 1
                waiting.remove(entry)
        if number == count // 10:
            first_memory = memory()
    engine.run()
    ends.update(checked(*entry, alone) for entry in waiting)
    assert ends.total() == count
    now = engine.stats()
    assert now.free_slots == SLOTS
    assert memory() < first_memory + SLACK
    seconds = time.perf_counter() - began
    print(
        f"{count:,} requests through {SLOTS} slots in {seconds:.0f} s: {dict(ends)}, {now.tokens:,} tokens, "
        f"{now.tokens / seconds:,.0f} a second, {now.prefix_hits:,} prompts begun from the store; "
        f"memory {first_memory / 2**20:.1f} MiB after a tenth, {memory() / 2**20:.1f} in the end"
    )


def checked(request: Request, place: int, length: int, alone: list[list[int]]) -> str:
    """How a request ended, after its text has been compared with what it is alone."""
    one = request.result()
    assert one.ids == alone[place][: len(one.ids)], "mixed up with another"
    assert len(one.ids) == length or one.finish != "length", "tokens were lost"
    return one.finish


def one_text(model: LanguageModel, count: int) -> None:
    """A text that goes on and on."""
    began, first_memory = time.perf_counter(), 0
    for number, _ in enumerate(stream(model, [1], max_new_tokens=count)):
        if number == count // 10:
            first_memory = memory()
    assert memory() < first_memory + SLACK
    seconds = time.perf_counter() - began
    print(
        f"{count:,} tokens in one text in {seconds:.0f} s: {count / seconds:,.0f} a second; "
        f"memory {first_memory / 2**20:.1f} MiB after a tenth, {memory() / 2**20:.1f} in the end"
    )


def memory() -> int:
    """What the process holds of the machine's memory, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
