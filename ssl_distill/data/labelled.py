"""The labelled images of a data module as training data."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from ssl_distill.data.module import BatchSet, ImageData, check_sizes


class LabelledData(LightningDataModule):
    """What evaluators learn from, shuffled, to train on; what they predict, to validate on.

    Args:
        images: Its `bank_size` is the number of labels that are trained on, its `query_size` that of tests.
        batch_size: Training images per rank; an epoch's incomplete last batch is left out.
    """

    def __init__(self, images: ImageData, batch_size: int = 128) -> None:
        super().__init__()
        check_sizes({"batch_size": batch_size})
        self.images = images
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        """Download where needed, on one rank."""
        self.images.prepare_data()

    def setup(self, stage: str) -> None:
        """Load, and refuse data without labels."""
        self.images.sampler(self._labelled(), self.batch_size)
        if self.images.num_classes is None:
            raise ValueError(f"`images` must have labels to train on, {type(self.images).__name__} was given none.")

    def train_dataloader(self) -> DataLoader:
        """Shuffled labelled batches; of a restored run, those that were not trained on yet."""
        return self.images.training_loader(self._labelled(), self.batch_size, self.trainer)

    def val_dataloader(self) -> DataLoader:
        """The images to predict."""
        return self.images.val_dataloader()[1]

    def _labelled(self) -> BatchSet:
        return self.images.parts.labelled or self.images.parts.bank
