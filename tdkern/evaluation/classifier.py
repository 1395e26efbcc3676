"""A small classifier of images, whose features tell sets of images apart: the network and its
training.
"""

import torch
from torch import Tensor, nn

from ..data.order import derive_seed, step_indices

BATCH = 128
PEAK_LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
WARMUP = 0.25  # share of the steps in which the learning rate grows


class Classifier(nn.Module):
    """Seven convolutions, each with batch normalisation and a ReLU, a mean over places, one linear
    layer.

    Args:
        width: channels of the first convolution; the last one's are 4 width, the features.
        classes: of the images.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            _layer(3, width, size=5, stride=2),
            _layer(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            _layer(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(4 * width),
        )
        self.head = nn.Linear(4 * width, classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8, H and W at least 8, to [B, 4 width] float32, none below 0."""
        x = images.float() / 127.5 - 1
        return self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 to logits [B, classes]."""
        return self.head(self.features(images))


class Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_layer(channels, channels), _layer(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _layer(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    width: int,
    epochs: int,
    seed: int,
    bar=None,
) -> Classifier:
    """A classifier of images by SGD with Nesterov's momentum, the learning rate in one cycle.

    Args:
        images: [N, 3, H, W] uint8.
        labels: [N] int64, classes from 0.
        width: of `Classifier`.
        epochs: passes over the images, at least 1.
        seed: of the initial weights, the order of the images and their augmentation.
        bar: a progress bar of tqdm's, which is told of every step.

    Raises:
        ValueError: the images are smaller than 8 x 8, or there is one class only.

    Returns:
        The network in evaluation mode, on the images' device. Deterministic on a CPU, for one
        number of threads.
    """
    if images.shape[2] < 8 or labels.max() < 1:
        raise ValueError(
            "train_classifier: needs images of at least 8x8 pixels and 2 classes, got "
            f"{images.shape[2]}x{images.shape[3]} and {labels.max() + 1}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        net = Classifier(width, int(labels.max()) + 1)
    net = net.to(images.device)
    generator = torch.Generator().manual_seed(derive_seed(seed, "step"))
    steps = max(2, epochs * len(images) // BATCH)
    optimizer = torch.optim.SGD(
        net.parameters(), PEAK_LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, steps, pct_start=WARMUP, anneal_strategy="linear", cycle_momentum=False
    )
    if bar is not None:
        bar.reset(steps)
    for step in range(steps):
        indices = step_indices(len(images), BATCH, seed, step).to(images.device)
        logits = net(_augmented(images[indices], generator))
        loss = nn.functional.cross_entropy(logits, labels[indices], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar is not None:
            bar.update()
    return net.eval()


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and moved by up to a 16th of its size, at random.

    What moves in at an edge is the image's own reflection there.
    """
    count, size = len(images), images.shape[2]
    reach = max(1, size // 16)
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(size) + offsets
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, size - 1 - columns, columns)
    rows, columns = (size - 1 - (size - 1 - each.abs()).abs() for each in (rows, columns))
    which = torch.arange(count)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, 3, H, W] uint8 whose class, of labels [N], the network names."""
    pairs = zip(images.split(500), labels.split(500), strict=True)
    right = sum((net(some).argmax(1) == theirs).sum().item() for some, theirs in pairs)
    return right / len(images)
