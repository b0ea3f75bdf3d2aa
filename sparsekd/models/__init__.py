"""The networks: CNNs for ratings, classifiers of small images, click models of streams, and recommenders by tables.

    models.RatingCNN(task.sizes, models.STUDENT)          ratings by what is known of a user and of an item
    models.FeatureCNN(task.sizes, models.TEACHER, mean)   a number by one vector of features
    models.classifier("wrn-16-2", classes=100)            an image network by name
    models.DLRM(numeric=13, ids=26)                       the logit of a click by numbers and ids; WideAndDeep, too
    models.MF(task.sizes, dim=64, density=0.1)            scores of items for users; NeuMF and LightGCN, too

Networks take sizes and numbers and know no task; they start from torch's global generator. Those of
ratings and images have `tap_names`, the modules whose outputs are the post-activation feature maps to distil, shallow
to deep. None has data-dependent control flow, so that torch.fx and torch.compile take them whole.
"""

from __future__ import annotations

from collections.abc import Callable

from .click import DLRM, WideAndDeep
from .layers import BasicBlock, Classifier
from .maps import FeatureCNN, MapCNN, RatingCNN, Shape
from .mobilenet import MobileNetV2
from .recommenders import MF, LightGCN, NeuMF, Recommender
from .resnet import ResNet
from .wrn import WideResNet

__all__ = [
    "CLASSIFIERS",
    "DLRM",
    "MF",
    "STUDENT",
    "TEACHER",
    "BasicBlock",
    "Classifier",
    "FeatureCNN",
    "LightGCN",
    "MapCNN",
    "MobileNetV2",
    "NeuMF",
    "RatingCNN",
    "Recommender",
    "ResNet",
    "Shape",
    "WideAndDeep",
    "WideResNet",
    "classifier",
]

STUDENT = Shape()
TEACHER = Shape(widths=(48, 128))

CLASSIFIERS: dict[str, Callable[[int], Classifier]] = {
    "wrn-40-2": lambda classes: WideResNet(40, 2, classes),
    "wrn-16-2": lambda classes: WideResNet(16, 2, classes),
    "resnet-34": lambda classes: ResNet((3, 4, 6, 3), classes),
    "resnet-18": lambda classes: ResNet((2, 2, 2, 2), classes),
    "mobilenet-v2": lambda classes: MobileNetV2(classes),
    "mobilenet-v2-half": lambda classes: MobileNetV2(classes, width=0.5),
}


def classifier(name: str, classes: int = 100) -> Classifier:
    """A network of `CLASSIFIERS`: images [B, 3, H, W] -> logits [B, classes].  ValueError for another name."""
    if name not in CLASSIFIERS:
        raise ValueError(f"sparsekd.models: the network must be one of {', '.join(CLASSIFIERS)}, got {name!r}")
    return CLASSIFIERS[name](classes)
