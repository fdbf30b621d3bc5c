"""The chunked frozen head against the plain one: peak memory and time of a forward and a backward pass, side by side in one run.

    OMP_NUM_THREADS=1 python bench/head.py                                          # a CPU
    python bench/head.py --device cuda --dtype bfloat16 --width 4096 --repeat 10    # a GPU

The plain head is what a trainer writes first: the model's own product in its own type, cast to fp32, log_softmax, entropy, autograd.
Peaks are PyTorch's own allocator's (inputs apart), so scratch inside operators is in them. Times are the best of `--repeat` (processor
time on one CPU thread, which other work on the machine disturbs least) as ratios to the plain head of the same problem. Where that would
not fit into the machine's free memory, its peak is arithmetic (marked ~) and the first chunk is 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from localrl.policy.head import Head, read_tokens

Reader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states (N, H) to (logp, entropy), (N,) each."""
MIB = 2**20
PLAIN_BYTES_A_LOGIT = 22
"""What the plain head was seen to hold at its peak in bf16, entropy included: only to know beforehand whether it fits."""


def plain(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(logp, entropy), every logit at once."""
    log_p = (hidden @ head.weight.T).float().log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def once(read: Reader, hidden: Tensor) -> None:
    """One forward and backward pass, as a policy loss with an entropy term would do it."""
    logp, entropy = read(hidden)
    (logp.sum() + 0.01 * entropy.sum()).backward()
    hidden.grad = None


def seconds(work: Callable[[], None], repeat: int, device: torch.device) -> float:
    """The best of `repeat`, after one that warms up."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for i in range(repeat + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start) if i else best
    return best


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Most that `work` had allocated at once, above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    now = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def error(read: Reader, hidden: Tensor, targets: Tensor, head: Head) -> float:
    """Largest error of a log-probability against fp64, nats, over the first 64 tokens."""
    z = hidden[:64].double() @ head.weight.double().T
    truth = z.log_softmax(1).gather(1, targets[:64, None])[:, 0]
    with torch.no_grad():
        return float((read(hidden)[0][:64].double() - truth).abs().max())


def readers(vocabulary: int, targets: Tensor, head: Head, sizes: list[tuple[int, int]]) -> Iterator[tuple[str, Reader]]:
    """(name, how to read) of the plain head, then of every (chunk, tile)."""
    yield "plain", lambda hidden: plain(hidden, targets, head)
    for chunk, tile in sizes:

        def read(hidden: Tensor, chunk: int = chunk, tile: int = tile) -> tuple[Tensor, Tensor]:
            logp, entropy, _ = read_tokens(hidden, targets, head, chunk=chunk, tile=tile)
            assert entropy is not None
            return logp, entropy

        yield f"chunk {chunk}, tile {'all' if tile >= vocabulary else tile}", read


def rows(vocabulary: int, tokens: int, settings: argparse.Namespace) -> None:
    """Prints the rows of one problem."""
    device, kind = torch.device(settings.device), getattr(torch, settings.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, settings.width, device=device).to(kind).requires_grad_()
    head = Head((torch.randn(vocabulary, settings.width, device=device) * 3 / settings.width**0.5).to(kind))
    targets = torch.randint(vocabulary, (tokens,), device=device)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    need, base = tokens * vocabulary * PLAIN_BYTES_A_LOGIT, None
    for name, read in readers(vocabulary, targets, head, settings.sizes):
        label = f"| {vocabulary:,} | {tokens:,} | {name} |"
        if name == "plain" and need > 0.8 * free:
            print(f"{label} ~{need / MIB:,.0f} | does not fit | |", flush=True)
            continue
        took = seconds(partial(once, read, hidden), settings.repeat, device)
        base = base or took
        peak = peak_bytes(partial(once, read, hidden), device)
        print(f"{label} {peak / MIB:,.0f} | {took / base:.2f} | {error(read, hidden, targets, head):.1e} |", flush=True)


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--width", type=int, default=512, help="hidden width")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sizes", nargs="+", default=["1024:4096", "256:4096", "64:4096", "256:all"], help="chunk:tile")
    parser.add_argument("--repeat", type=int, default=1)
    settings = parser.parse_args()
    settings.sizes = [(int(c), 10**9 if t == "all" else int(t)) for c, t in (size.split(":") for size in settings.sizes)]
    print(f"{settings.dtype}, width {settings.width}, {settings.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| vocabulary | tokens | head | peak MiB | time, plain = 1 | largest error of logp, nats |\n|---|---|---|---|---|---|")
    for vocabulary in settings.vocabulary:
        for tokens in settings.tokens:
            rows(vocabulary, tokens, settings)


if __name__ == "__main__":
    main()
