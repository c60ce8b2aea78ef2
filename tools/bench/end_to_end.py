"""Images per second of `ssl-distill fit` on a folder of JPEGs, against lightly's DINO example on the same files.

Run: python tools/bench/end_to_end.py [--images 5000] [--workers 2] [--rounds 2]   (pip install lightly scikit-learn)
Protocol: JPEGs of 500 x 375 cut from scikit-learn's photographs; tiny ViT, 2 crops of 32 px and 2 of 16 px with the
whole colour chain, K 1,024, batch 64, equal workers, one thread in the training process. Ours is the real command,
without evaluation; the other side is lightly's transform, loss and head in the plain loop of its example.
Times: each side runs one epoch and three epochs in processes of its own, sides alternate; the difference is two epochs
without start-up. CPU seconds of the process and its workers, and wall time.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ratio, spread

BATCH = 64
CONFIG = """
trainer: {{accelerator: cpu, devices: 1, limit_val_batches: 0, num_sanity_val_steps: 0, enable_progress_bar: false}}
model:
  class_path: ssl_distill.methods.dino.DINO
  init_args:
    backbone: vit_nano_patch8_32
    num_prototypes: 1024
    augment:
      class_path: ssl_distill.augment.multi_crop.MultiCropAugment
      init_args: {{global_size: 32, local_size: 16, num_local: 2}}
data:
  class_path: ssl_distill.data.image_folder.ImageFolderData
  init_args: {{root: {root}, decode_size: 64, batch_size: {batch}, num_workers: {workers}}}
"""


def write_jpegs(folder: Path, count: int) -> None:
    """Photographs, each cut and mirrored at random."""
    from sklearn.datasets import load_sample_images
    from torchvision.io import write_jpeg

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (
            int(torch.randint(side - cut + 1, (), generator=generator))
            for side, cut in zip(photograph.shape[1:], (375, 500), strict=True)
        )
        cut = photograph[:, top : top + 375, left : left + 500]
        write_jpeg(cut.flip(2) if number % 3 else cut, str(folder / f"{number:05}.jpg"), quality=90)


def lightly_fit(folder: Path, epochs: int, workers: int) -> None:
    """What lightly's DINO example does."""
    from lightly.data import LightlyDataset
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms.dino_transform import DINOTransform
    from torch.utils.data import DataLoader

    from ssl_distill.backbones.create import create_backbone, embed_dim_of

    transform = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=2)
    loader = DataLoader(
        LightlyDataset(str(folder), transform=transform), BATCH, shuffle=True, drop_last=True, num_workers=workers
    )
    backbone, teacher = (create_backbone("vit_nano_patch8_32") for _ in range(2))
    head, teacher_head = (DINOProjectionHead(embed_dim_of(backbone), 2048, 256, 1024) for _ in range(2))
    teacher.requires_grad_(False)
    teacher_head.requires_grad_(False)
    criterion = DINOLoss(1024, warmup_teacher_temp_epochs=0)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-4)
    for epoch in range(epochs):
        for batch in loader:
            update_momentum(backbone, teacher, 0.996)
            update_momentum(head, teacher_head, 0.996)
            views = batch[0]
            with torch.no_grad():
                targets = [teacher_head(teacher(view)) for view in views[:2]]
            loss = criterion(targets, [head(backbone(view)) for view in views], epoch=epoch)
            loss.backward()
            head.cancel_last_layer_gradients(current_epoch=epoch)
            optimizer.step()
            optimizer.zero_grad()


def cost(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a command and all it started."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # workers have the other cores
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lightly", type=Path, help=argparse.SUPPRESS)  # the other side's process
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.lightly:
        lightly_fit(arguments.lightly, arguments.epochs, arguments.workers)
        return

    with tempfile.TemporaryDirectory() as name:
        temporary, images = Path(name), Path(name) / "images"
        images.mkdir()
        write_jpegs(images, arguments.images)
        config = temporary / "config.yaml"
        config.write_text(CONFIG.format(root=images, batch=BATCH, workers=arguments.workers))
        ours = [str(Path(sys.executable).with_name("ssl-distill")), "fit", "-c", str(config)]
        theirs = [sys.executable, __file__, "--workers", str(arguments.workers), "--lightly", str(images)]
        sides = {
            "ours": lambda n: [*ours, "--trainer.max_epochs", n, "--trainer.default_root_dir", f"{temporary}/run"],
            "lightly": lambda n: [*theirs, "--epochs", n],
        }
        seen = 2 * (arguments.images // BATCH * BATCH)
        seconds: dict[str, dict[str, list[float]]] = {side: {"CPU": [], "wall": []} for side in sides}
        for _ in range(arguments.rounds):
            for side, command in sides.items():
                (cpu_1, wall_1), (cpu_3, wall_3) = cost(command("1")), cost(command("3"))
                seconds[side]["CPU"].append((cpu_3 - cpu_1) / seen)
                seconds[side]["wall"].append((wall_3 - wall_1) / seen)

    print(f"{arguments.images} JPEGs of 500 x 375, batch {BATCH}, {arguments.workers} workers, n = {arguments.rounds}")
    print(f"{'images per second':26}{'median':>10}{'min':>10}{'max':>10}")
    for side, kinds in seconds.items():
        for kind, values in kinds.items():
            print(f"{side:10}{kind:16}{spread([1 / value for value in values])}")
    for kind in ("CPU", "wall"):
        print(f"{kind}: ours is {ratio(seconds['lightly'][kind], seconds['ours'][kind]):.2f}x as fast")


if __name__ == "__main__":
    main()
