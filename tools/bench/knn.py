"""Time and peak memory of the weighted k-NN vote against a vote by one-hot labels, chunk by chunk.

Run: python tools/bench/knn.py [--quick] [--repeats 7]
Protocol: bank of 50,000 random features of width 384, 1,000 classes, temperature 0.07, single k and DINO's four.
The other side, as DINO's code does, computes all similarities of a chunk of queries, takes the k largest, sums a
(chunk * k x classes) one-hot matrix of the neighbours' labels and sorts the classes; it searches anew for each k. Both
sides count right predictions.
Times: CPU seconds, one process, one thread, sides alternate, medians, first round left out.
Memory: peak resident size of a process that runs one side only, minus its size before, for two sizes of the bank
(Linux only).
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import added_peak_mib, paired_times, ratio, spread

from ssl_distill.evaluate.features import Features
from ssl_distill.evaluate.knn import nearest_neighbors, rank_of, vote

TEMPERATURE, WIDTH, CLASSES, CHUNK = 0.07, 384, 1000, 512
Side = Callable[[Features, Features, list[int]], list[int]]


def ours(bank: Features, query: Features, ks: list[int]) -> list[int]:
    """Queries whose class is among the first five, for every k: what `KNN` does."""
    similarity, position = nearest_neighbors(bank.features, query.features, max(ks), CHUNK)
    votes = (vote(similarity[:, :k], bank.labels[position[:, :k]], TEMPERATURE, CLASSES) for k in ks)
    return [int((rank_of(query.labels, scores) < 5).sum()) for scores in votes]


def one_hot(bank: Features, query: Features, ks: list[int]) -> list[int]:
    """The same by a one-hot matrix per chunk."""
    unit_bank, unit_query = F.normalize(bank.features).T, F.normalize(query.features)
    right = []
    for k in ks:
        count = 0
        for part, label in zip(unit_query.split(CHUNK), query.labels.split(CHUNK), strict=True):
            similarity, position = (part @ unit_bank).topk(k)
            labels = torch.zeros(len(part) * k, CLASSES).scatter_(1, bank.labels[position].view(-1, 1), 1)
            weights = (similarity / TEMPERATURE).exp()
            scores = (labels.view(len(part), k, CLASSES) * weights[:, :, None]).sum(dim=1)
            _, classes = scores.sort(1, descending=True)
            count += int((classes[:, :5] == label[:, None]).sum())
        right.append(count)
    return right


SIDES: dict[str, Side] = {"ours": ours, "one-hot": one_hot}


def random_data(num_bank: int, num_query: int) -> tuple[Features, Features]:
    """The same bank and queries for both sides: noisy copies of class centers, which k-NN gets partly right."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    parts = []
    for count in (num_bank, num_query):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        rows = centers[labels] + 4 * torch.randn(count, WIDTH, generator=generator)
        parts.append(Features(rows, labels, torch.arange(count)))
    return parts[0], parts[1]


def one_search(side: str, num_bank: int, num_query: int) -> Callable[[], object]:
    """What memory is measured of, k = 20."""
    bank, query = random_data(num_bank, num_query)
    return lambda: SIDES[side](bank, query, [20])


def compare_times(num_bank: int, num_query: int, ks: list[int], repeats: int) -> None:
    """Print one row per side and the ratio."""
    bank, query = random_data(num_bank, num_query)
    first, second = (side(bank, query, ks) for side in SIDES.values())
    # Float rounding may swap neighbours or classes that are all but equal.
    if any(abs(a - b) > 0.002 * num_query for a, b in zip(first, second, strict=True)):
        raise RuntimeError(f"the sides differ: {first} and {second} right predictions.")
    times = paired_times({name: partial(side, bank, query, ks) for name, side in SIDES.items()}, repeats)
    print(f"\nk {ks}, bank {num_bank}, queries {num_query}, {first} right, n = {repeats}")
    for name, seconds in times.items():
        print(f"{name:10} median, min, max s {spread(seconds)}")
    print(f"ours is {ratio(times['one-hot'], times['ours']):.2f}x as fast")


def main() -> None:
    """Print times and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="for the times, a fifth of the bank and an eighth of the queries"
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_bank, num_query = (10_000, 256) if arguments.quick else (50_000, 2048)
    print(f"weighted k-NN vote, width {WIDTH}, {CLASSES} classes, chunks of {CHUNK} queries")
    for ks in ([20], [200], [10, 20, 100, 200]):
        compare_times(num_bank, num_query, ks, arguments.repeats)

    print(f"\npeak MiB, k 20, queries {num_query}")
    for size in (50_000, 200_000):
        for side in SIDES:
            print(f"bank {size:8} {side:10} {added_peak_mib(one_search, side, size, num_query):8.0f}")


if __name__ == "__main__":
    main()
