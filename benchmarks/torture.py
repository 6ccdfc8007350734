"""`make torture`: faults injected into real runs by the hundred, and what they have cost.

The same as the tests do, with ten times the counts: processes killed and asked to end at random
moments, checkpoints and journals damaged at random places. Each run is then resumed and compared,
to the last bit, with one that nothing happened to.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from interruptions import Fault, differences, interrupted_run, reference, resume

COUNTS = {"SIGKILL": 200, "SIGINT": 50, "SIGTERM": 50, "damage": 200}


def faults(counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    for name, count in counts.items():
        yield from ((name, number) for number in range(count))


def injected(name: str, number: int, folder: Path) -> Path:
    """A run with a fault, resumed. Returns its folder."""
    rng = random.Random(f"{name} {number}")
    own = interrupted_run(folder, Fault("SIGKILL" if name == "damage" else name, rng))
    if name == "damage":
        damage(own, rng)
    resume(own)
    return own


def damage(own: Path, rng: random.Random) -> None:
    """Truncates the newest checkpoint, its digest or the journal's end, or flips a bit there."""
    states = sorted(own.glob("state-*.pt"))
    journal = own / "journal.jsonl"
    path = rng.choice([*states[-1:], *sorted(own.glob("state-*.sha256"))[-1:], journal])
    content = bytearray(path.read_bytes())
    if path == journal:  # what a power cut leaves: a torn end
        content += content[: rng.randrange(1, 60)].replace(b"\n", b" ")
    elif rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(min(len(content), 64) if path.suffix != ".pt" else len(content))] ^= (
            1 << rng.randrange(8)
        )
    path.write_bytes(content)


def kinds(found: list[str]) -> Iterator[str]:
    """What each difference means: a point or a status that is lost, doubled, or not the same."""
    for text in found:
        if text.startswith("recorded twice"):
            yield "doubled"
        elif text.startswith("status") or "[]" in text:
            yield "lost"
        else:
            yield "differing"


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts, as in 0.1")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    counts = {name: max(1, round(count * asked.share)) for name, count in COUNTS.items()}
    found = {name: Counter[str]() for name in counts}
    began = time.monotonic()
    with TemporaryDirectory() as temporary:
        whole = reference(Path(temporary))
        for name, number in faults(counts):
            with TemporaryDirectory(dir=temporary) as folder:
                what = differences(injected(name, number, Path(folder)), whole)
            found[name].update(set(kinds(what)))
            if what:
                say(f"{name} {number}: {what}")
    say("| fault | times injected | lost | doubled | differing |")
    say("| --- | ---: | ---: | ---: | ---: |")
    for name, count in counts.items():
        costs = " | ".join(str(found[name][kind]) for kind in ("lost", "doubled", "differing"))
        say(f"| {name} | {count} | {costs} |")
    say(f"\n{time.monotonic() - began:.0f} s")
    sys.exit(any(sum(each.values()) for each in found.values()))


if __name__ == "__main__":
    main()
