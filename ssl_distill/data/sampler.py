"""Orders of training images that a resumed run continues."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DistributedSampler

from ssl_distill.draws import Draws


class EpochSampler(DistributedSampler[int]):
    """A new permutation every epoch, as a pure function of (seed, epoch), in whole batches.

    Its items tell the epoch too, `epoch * len(dataset) + position`: loader processes live on and would not know.

    The ranks share one permutation image by image, so global batch s of an epoch holds the same images on two ranks as
    on one rank with the doubled batch. Being a `DistributedSampler`, Lightning leaves it in place and names the epoch.

    Args:
        dataset: What is sampled; only its length counts.
        batch_size: Images per rank and batch; an incomplete last batch is left out.
        seed: Of the permutations.
        num_replicas: Number of ranks.
        rank: This rank.

    Raises:
        ValueError: If there are fewer images than one global batch.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.num_images = len(dataset)
        self.num_batches = self.num_images // (batch_size * num_replicas)
        if self.num_batches == 0:
            raise ValueError(
                f"`batch_size` must be at most {self.num_images // num_replicas} for {self.num_images} images on"
                f" {num_replicas} rank(s), got {batch_size}."
            )
        self.batch_size = batch_size
        self.num_samples = self.num_batches * batch_size
        self._start = (0, 0)

    def resume_at(self, epoch: int, batches_done: int) -> None:
        """Start at this epoch, and leave out the batches of it that are done; later epochs are whole.

        Loader processes ask for their first batches before Lightning names the epoch: call this before.
        """
        self.set_epoch(epoch)
        self._start = (epoch, batches_done)

    def __iter__(self) -> Iterator[int]:
        seed = Draws(self.seed, self.epoch).batch_seed(-1, 0)  # -1: no batch, so no other generator starts from it
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.num_images, generator=generator)
        mine = order[self.rank :: self.num_replicas][: self.num_samples]
        epoch, batches_done = self._start
        left = mine[batches_done * self.batch_size if self.epoch == epoch else 0 :]
        return iter((self.epoch * self.num_images + left).tolist())

    def __len__(self) -> int:
        """Images of a whole epoch on this rank, also when it is resumed: Lightning counts from there."""
        return self.num_samples
