"""Times fam and what users would pick instead in turns, in one run, and writes JSON: compare.py FAM OUT.json [--threads N] ...

For each case and dtype: `fam perf --serve` checks itself against its reference and writes the case; every peer's results are compared with
fam's before anything is timed; peers that are wrong, or cannot run it, are named and left out; so are those that take more than SLOW times
as long as the fastest. Then rounds: fam's roof, and a turn of each party in random order.

Time is own CPU time on one thread, wall time on more. A ratio is peer / fam in one round; its interval a percentile bootstrap of the median.
"""
import argparse
import datetime
import gc
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings

CASES = "A,B,C,D,E-64,E-128,F-linear,F-delta,A-backward,B-backward"
SLOW = 1.5  # A peer that is slower than the best one by more, on a first look, is not the best one.
TURN = 0.03  # Seconds: short samples are repeated within a turn.
WARM = 0.01  # Seconds of samples before them: the first ones bring the caches back from the party before, whoever it was.
REST = 0.05  # Seconds before a turn on several threads, in which idle threads of the party before stop spinning: ONNX Runtime's take 35 ms.


class Fam:
    """The program, as a party that takes samples when asked."""

    def __init__(self, program, case, dtype, threads, folder):
        command = [program, "--json", "perf", "--serve", folder, "--case", case, "--dtype", dtype, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.environment = self.answer()["environment"]
        self.prepared = self.answer()
        self.name = f"{case} {dtype}"
        if self.prepared["type"] != "prepared":
            sys.exit(f"fam: {self.prepared}")

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("fam has ended")

    def ask(self, what, count=1):
        self.process.stdin.write(f"{what}\n" * count)
        self.process.stdin.flush()
        return [self.answer() for _ in range(count)]

    def samples(self, count):
        return [(s["seconds"], s["cpu_seconds"]) for s in self.ask(self.name, count)]

    def roof(self):
        """Seconds of a sample at the rates that the machine has now."""
        p, rates = self.prepared, self.ask("roof")[0]["rates"]
        by_arithmetic = p["flops"] / rates["flops"] + p["bf16_flops"] / rates["bf16_flops"] + p["exps"] / rates["exps"]
        return p["bytes"] / rates["bytes"] if p["bound"] == "memory" else by_arithmetic, rates

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Peer:
    def __init__(self, run):
        self.run = run

    def samples(self, count):
        taken = []
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            self.run()
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
        return taken


def turn(party, seconds, threads):
    """The median (wall, CPU) of as many samples as fill a turn; `seconds`: how long one takes."""
    if threads > 1:
        time.sleep(REST)
    party.samples(math.ceil(WARM / seconds))
    taken = party.samples(max(1, round(TURN / seconds)))
    return [median([sample[clock] for sample in taken]) for clock in (0, 1)]


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def interval(values, resamples=2000):
    """95 % of the medians of resamples."""
    chance = random.Random(1)
    medians = sorted(median(chance.choices(values, k=len(values))) for _ in range(resamples))
    return [medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]]


def right_peers(problem, threads):
    """The peers whose results are right, and why others are left out."""
    import peers_ggml
    import peers_onnx
    import peers_torch
    right, left_out = {}, {}
    all_peers = peers_torch.peers(problem) | peers_onnx.peers(problem, threads) | peers_ggml.peers(problem, threads)
    for name, make in all_peers.items():
        try:
            run, results = make()
            fault = problem.fault(results())
        except Exception as error:  # Whatever a library raises where it has no kernel.
            fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if fault:
            left_out[name] = fault
        else:
            right[name] = Peer(run)
    return right, left_out


def compare(fam, threads, rounds):
    """One case and dtype."""
    from problem import Problem
    peers, left_out = right_peers(Problem(fam.prepared), threads)
    clock = 0 if threads > 1 else 1
    parties = {"fam": fam} | peers
    first = {name: min(sample[clock] for sample in party.samples(3)) for name, party in parties.items()}
    fastest = min((first[name] for name in peers), default=0)
    parties = {name: party for name, party in parties.items() if name == "fam" or first[name] <= SLOW * fastest}
    turns, roofs, chance = {name: [] for name in parties}, [], random.Random(1)
    for _ in range(rounds):
        roofs.append(fam.roof())
        for name in chance.sample(list(parties), len(parties)):
            turns[name].append(turn(parties[name], first[name], threads))

    ours = turns["fam"]
    row = {key: fam.prepared[key] for key in ("case", "what", "dtype", "threads", "kernel", "flops", "bf16_flops", "exps", "bytes", "bound", "calls")}
    # The probes take wall time, and other load only makes them slower: the best round is the machine.
    seconds, (roof, rates) = median([t[clock] for t in ours]), min(roofs, key=lambda roof: roof[0])
    row |= {"clock": ["wall", "cpu"][clock], "seconds": seconds, "roof": roof, "rates": rates, "share": roof / seconds,
            "left_out": left_out, "first_look": first, "peers": {}}
    for name, theirs in turns.items():
        if name != "fam":
            ratios = [t[clock] / o[clock] for t, o in zip(theirs, ours)]
            row["peers"][name] = {"seconds": median([t[clock] for t in theirs]), "ratio": median(ratios), "interval": interval(ratios)}
    row["best"] = min(row["peers"], key=lambda name: row["peers"][name]["ratio"], default=None)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fam")
    parser.add_argument("out", help="gains the rows of this run; rows of the same case, dtype and threads are replaced")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--case", default=CASES)
    parser.add_argument("--dtype", default="f32,bf16,f16")
    args = parser.parse_args()
    # Before torch starts its threads.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import onnxruntime
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}

    found = {"rows": []}
    if os.path.exists(args.out):
        with open(args.out) as file:
            found = json.load(file)
    for case in args.case.split(","):
        for dtype in args.dtype.split(","):
            torch.compiler.reset()
            with tempfile.TemporaryDirectory() as folder:
                fam = Fam(args.fam, case, dtype, args.threads, folder)
                gc.collect()
                gc.disable()
                row = compare(fam, args.threads, args.rounds)
                gc.enable()
                fam.close()
            row |= {"rounds": args.rounds, "date": datetime.date.today().isoformat(), "versions": versions, "environment": fam.environment}
            key = lambda row: (row["case"], row["dtype"], row["threads"])
            found["rows"] = [other for other in found["rows"] if key(other) != key(row)] + [row]
            best = row["peers"].get(row["best"])
            ratio = "no peer" if best is None else "{:.2f} [{:.2f}, {:.2f}] {}".format(best["ratio"], *best["interval"], row["best"])
            print(f"{case:10} {dtype:4} {args.threads} threads {row['seconds'] * 1e3:9.3f} ms {100 * row['share']:3.0f} % of the roof  {ratio}", flush=True)
            for name, why in row["left_out"].items():
                print(f"{'':10} left out: {name}: {why}", flush=True)
            with open(args.out, "w") as file:
                json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
