"""Training that is stopped and harmed at random moments, again and again: is anything lost?

    python scripts/recovery.py [--tries 400] [--two 40] [--out FOLDER] [--seed 0] [--waits]

Each try harms a run of a tiny model on the digits in one way, goes on with `--resume` until the run
is complete, and compares its last checkpoint bitwise, and the values of metrics.jsonl, with those
of a run that was never harmed:

- flip, cut, overwrite, remove: bits of a random file of the run folder, its end, some bytes, or all
  of it, from config.yaml to the lock; before the run goes on, every reader must return what it
  returned before the harm, or one line.
- kill, SIGTERM, twice Ctrl-C: signals at random moments, up to four for each run.
- full disk: the run is written to a disk of a random size (a tmpfs, which needs root).
- large files: no file can grow beyond a random size (RLIMIT_FSIZE).
- two processes: a signal reaches one or both of two that are connected by gloo, or a file is
  harmed.

It prints a table, and exits with 1 if anything was lost. Tries are kept in FOLDER/tries.jsonl, and
the same command goes on after an interruption. A try takes a second or two; it needs fork.

With --waits it prints instead what a step waits for its checkpoint, and what writing that takes, on
the disk of FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from flowdopr.cli import run_command
from flowdopr.config import load_config
from flowdopr.data import DatasetInfo
from flowdopr.evaluate import evaluate
from flowdopr.evaluate.card import read_card
from flowdopr.models import build_model
from flowdopr.runs import RunFolder, begin_run
from flowdopr.train.meter import PARTS
from flowdopr.train.saving import Saver

CONFIG = """
name: straight
data: {name: digits}
model: {name: dit, depth: 1, hidden_size: 16, num_heads: 2, patch_size: 4}
optimizer: {name: dopr-adamw, lr: 3e-3, dopr: {refresh_every: 4}}
train: {steps: 24, global_batch_size: 16, ema_decays: [0.9], ema_lengths: [0.1], log_every: 2,
  validate_every: 6, checkpoint_every: 4, keep_checkpoints: 3}
sample: {solver: {name: euler, steps: 2}, num_images: 4}
evaluate: {metrics: [spectrum], fid_num_images: 16}
"""
CUT_AT = 18  # the step at which the runs stop whose files are harmed
TIMES = {"seconds_per_step", "images_per_second", "peak_memory_mib", "evaluation_seconds", *PARTS}
OUTCOMES = ("same", "refused", "different", "traceback", "silent")
HEADINGS = ("bitwise the same", "refused in one line", "divergences", "tracebacks", "silent errors")


class Tries:
    """The runs that were never harmed, and the tries beside them, in one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.config = out / "recovery.yaml"
        out.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG)

    def settings(self, name: str, *more: str) -> list[str]:
        return [f"output={self.out}", f"name={name}", *more]

    def start(self, name: str, processes: int, *more: str, limit: int = 0) -> list[int]:
        """Train `name` in forked processes, with --resume; returns their ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["train", str(self.config), *self.settings(name, *more), "--resume"]
        return [
            fork(
                lambda rank=rank: run_command(command),
                self.out / f"said-{rank}.txt",
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {},
                limit,
            )
            for rank in range(processes)
        ]

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.out.glob("said-*.txt")))

    def finish(self, name: str, processes: int) -> str | None:
        """Train `name` to its end; returns None, or why that did not work: an outcome."""
        codes = [wait(pid) for pid in self.start(name, processes)]
        said = self.said()
        if "Traceback" in said:
            return "traceback"
        return None if codes == [0] * processes else "refused"

    def compare(self, name: str, processes: int) -> str:
        """`same` or `different`: the last checkpoint and the metrics of `name`."""
        straight, run = (RunFolder.open(self.out / one) for one in (straight_name(processes), name))
        return "same" if end_of(straight) == end_of(run) else "different"


def straight_name(processes: int) -> str:
    return f"straight-{processes}"


def end_of(run: RunFolder) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    folder = run.checkpoint_path(run.config.train.steps)
    tensors = {path.name: path.read_bytes() for path in folder.glob("*.*") if is_tensors(path)}
    lines = ({k: v for k, v in line.items() if k not in TIMES} for line in run.metrics())
    return tensors, [line for line in lines if line.keys() > {"step"}]


def is_tensors(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt")


def fork(work: Callable[[], int], said: Path, environment: dict[str, str], limit: int = 0) -> int:
    """Do `work` in a process whose stdout and stderr are the file `said`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ |= environment
        with open(said, "wb") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = work()
    except KeyboardInterrupt:  # before the command or after it
        code = 130
    except BaseException as error:  # whatever the command line did not explain
        os.write(2, f"Traceback: {error!r}".encode())
        code = 70
    os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What a checkpoint costs


def waits(tries: Tries) -> str:
    """A table of the seconds for which a step waits, for models of three sizes."""
    rows = ["| checkpoint | a step waits | writing takes |", "|---" * 3 + "|"]
    for width in (64, 256, 640):
        size = f"model={{name: dit, depth: 4, hidden_size: {width}, num_heads: 4, patch_size: 2}}"
        more = [size, "train.ema_lengths=[]", "train.keep_checkpoints=2"]
        config = load_config(tries.config, tries.settings(f"waits-{width}", *more))
        shutil.rmtree(tries.out / config.name, ignore_errors=True)
        info = DatasetInfo("digits", (1, 8, 8), 10, tuple("0123456789"), 1, 1, "")
        run = begin_run(config, info, {}, resume=False)
        model = build_model(config, info.image_shape, info.num_classes)
        optimizer = torch.optim.AdamW(model.parameters())
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        weights, waited, written = model.state_dict(), [], []
        state = {"losses": torch.zeros(0), "optimizer": optimizer.state_dict(), "scaler": None}
        with Saver(run, 0) as saver:
            for step in range(1, 11):
                started = time.perf_counter()
                averages = {"ema-0.9": weights}
                saver.save(step, model=weights, averages=averages, state=state, note={})
                waited.append(time.perf_counter() - started)
                saver.wait()
                written.append(time.perf_counter() - started - waited[-1])
        size = sum(path.stat().st_size for path in run.checkpoint_path(10).iterdir()) / 2**20
        rows.append(f"| {size:.0f} MiB | {mean(waited):.3f} s | {mean(written):.3f} s |")
    return "\n".join(rows)


# Harm to files


def harm(path: Path, kind: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content)) if content else 0
    if kind == "remove":
        path.unlink()
        return
    if kind == "cut":
        del content[place:]
    elif kind == "overwrite":
        content[place : place + 64] = chance.randbytes(64)
    elif content:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def read_all(run: Path) -> dict[str, Any]:
    """What each reader of a run folder returns, or its one line."""
    readers: dict[str, Callable[[], Any]] = {
        "config": lambda: RunFolder.open(run).config.model_dump(exclude={"name"}),
        "data": lambda: RunFolder.open(run).dataset,
        "versions": lambda: RunFolder.open(run).made_by(),
        "metrics": lambda: RunFolder.open(run).metrics(),
        "model": lambda: weights_of(RunFolder.open(run)),
        "posthoc": lambda: tensors_of(RunFolder.open(run).load_weights(CUT_AT, "posthoc-0.1")),
    }
    for path in (run / "evaluation").glob("*.json"):
        readers[path.name] = lambda path=path: read_card(path)
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except ValueError as error:
            found[name] = f"one line: {error}"
    return found


def weights_of(run: RunFolder) -> Any:
    model, step = run.load_model()
    return step, tensors_of(model.state_dict())


def tensors_of(state: Any) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.items()}


def silent(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The readers that returned something else and said nothing."""
    return [
        name
        for name, value in after.items()
        if value != before.get(name)
        and not (isinstance(value, str) and "\n" not in value)
        and not (name.endswith(".json") and value is None)  # this card is made again
        and not (name == "metrics" and value == before[name][:-1])  # the last line was cut
    ]


def try_harm(tries: Tries, name: str, kind: str, processes: int, chance: random.Random) -> str:
    run, origin = tries.out / name, tries.out / f"cut-{processes}"
    shutil.copytree(origin, run)
    path = chance.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    harm(path, kind, chance)
    if wrong := silent(read_all(origin), read_all(run)):
        print(f"{kind} of {path}: read silently: {wrong}")
        return "silent"
    return tries.finish(name, processes) or tries.compare(name, processes)


# Signals and disks


def try_signals(tries: Tries, name: str, kind: str, processes: int, chance: random.Random) -> str:
    signals = {"kill": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM], "Ctrl-C": [signal.SIGINT] * 2}
    for _ in range(chance.randint(1, 4)):
        pids = tries.start(name, processes)
        hit = chance.sample(pids, chance.randint(1, processes))
        time.sleep(chance.uniform(0, tries_seconds(tries, processes)))
        for signum in signals[kind]:
            for pid in hit:
                os.kill(pid, signum)
            time.sleep(chance.uniform(0, 0.1))
        codes = [wait(pid) for pid in pids]
        if "Traceback" in tries.said():
            return "traceback"
        if codes == [0] * processes:
            break
    return tries.finish(name, processes) or tries.compare(name, processes)


def tries_seconds(tries: Tries, processes: int) -> float:
    return float((tries.out / f"seconds-{processes}.txt").read_text())


def try_small_disk(
    tries: Tries, name: str, kind: str, processes: int, chance: random.Random
) -> str:
    run, disk = tries.out / name, tries.out / "disk"
    if kind == "large files":
        codes = [
            wait(pid) for pid in tries.start(name, processes, limit=chance.randint(100, 90_000))
        ]
    else:
        disk.mkdir(exist_ok=True)
        if disk.is_mount():  # of a try that was stopped
            subprocess.run(["umount", disk], check=True)
        size = chance.randint(20, 800)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            codes = [wait(pid) for pid in tries.start(name, processes, f"output={disk}")]
            if (disk / name).exists():
                shutil.copytree(disk / name, run)
        finally:
            subprocess.run(["umount", disk], check=True)
    if "Traceback" in tries.said():
        return "traceback"
    if codes == [0] and tries.compare(name, processes) != "same":
        return "silent"
    return tries.finish(name, processes) or tries.compare(name, processes)


HARM, SIGNALS = ("flip", "cut", "overwrite", "remove"), ("kill", "SIGTERM", "Ctrl-C")
KINDS = {
    **dict.fromkeys(HARM, try_harm),
    **dict.fromkeys(SIGNALS, try_signals),
    **dict.fromkeys(("full disk", "large files"), try_small_disk),
}
SHARES = {"flip": 6, "cut": 3, "overwrite": 2, "remove": 2, "kill": 2}  # of the others: 1


def prepare(tries: Tries, processes: int) -> None:
    """The runs that were never harmed, and one with a card that stopped in the middle."""
    straight = tries.out / straight_name(processes)
    if (tries.out / f"seconds-{processes}.txt").exists():
        return
    for name in (straight.name, f"cut-{processes}"):
        shutil.rmtree(tries.out / name, ignore_errors=True)
    started = time.monotonic()
    if wrong := tries.finish(straight.name, processes):
        sys.exit(f"the run that is not harmed failed: {wrong}: {tries.said()}")
    seconds = time.monotonic() - started
    # SIGTERM would stop it at any step: a shorter run with the rate of the longer one stands in.
    pids = tries.start(f"cut-{processes}", processes, f"train.steps={CUT_AT}")
    if any(wait(pid) for pid in pids):
        sys.exit(f"the run that stops at step {CUT_AT} failed: {tries.said()}")
    card = tries.out / "said-card.txt"
    run = tries.out / f"cut-{processes}"
    if wait(fork(lambda: evaluate(run) and 0, card, {})):
        sys.exit(f"the evaluation failed: {card.read_text()}")
    (tries.out / f"seconds-{processes}.txt").write_text(str(seconds))


def planned(tries: int, two: int, seed: int) -> list[tuple[str, int, int]]:
    """Kind, processes and seed of each try, in a random order, so that a part is a fair sample."""
    kinds = [kind for kind in KINDS for _ in range(SHARES.get(kind, 1))]
    if os.getuid() != 0:
        kinds.remove("full disk")
    chance = random.Random(seed)
    of_one = [(kinds[number % len(kinds)], 1, number) for number in range(tries)]
    of_two = [((*HARM, *SIGNALS)[number % 7], 2, number) for number in range(two)]
    return chance.sample(of_one + of_two, tries + two)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=400, help="on one process")
    parser.add_argument("--two", type=int, default=40, help="on two processes")
    parser.add_argument("--out", type=Path, default=Path("recovery"), help="folder for the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--waits", action="store_true", help="what a checkpoint costs")
    chosen = parser.parse_args()
    tries, kept = Tries(chosen.out), chosen.out / "tries.jsonl"
    if chosen.waits:
        sys.exit(print(waits(tries)))
    for processes in (1, 2)[: 1 + bool(chosen.two)]:
        prepare(tries, processes)
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {tuple(key): outcome for key, outcome in map(json.loads, lines)}
    for kind, processes, number in planned(chosen.tries, chosen.two, chosen.seed):
        key = (kind, processes, number, chosen.seed)
        if key in done:
            continue
        name = "try"
        shutil.rmtree(tries.out / name, ignore_errors=True)
        chance = random.Random(f"{key}")
        done[key] = KINDS[kind](tries, name, kind, processes, chance)
        with open(kept, "a") as file:
            file.write(json.dumps([key, done[key]]) + "\n")
        if done[key] != "same":
            print(f"{key}: {done[key]}: {tries.said()[-300:]}", flush=True)
            shutil.copytree(tries.out / name, tries.out / f"{kind}-{number}", dirs_exist_ok=True)
    counts = Counter((key[0], key[1], outcome) for key, outcome in done.items())
    print(table(counts))
    sys.exit(any(outcome not in ("same", "refused") for outcome in done.values()))


def table(counts: Counter[tuple[str, int, str]]) -> str:
    rows = ["| harm | processes | tries | " + " | ".join(HEADINGS) + " |", "|---" * 8 + "|"]
    for processes in (1, 2):
        for kind in KINDS:
            found = [counts[kind, processes, outcome] for outcome in OUTCOMES]
            if any(found):
                cells = (kind, processes, sum(found), *found)
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    total = [sum(n for (_, _, what), n in counts.items() if what == one) for one in OUTCOMES]
    return "\n".join([*rows, "| " + " | ".join(map(str, ("all", "", sum(total), *total))) + " |"])


if __name__ == "__main__":
    main()
