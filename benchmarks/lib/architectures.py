"""Public architectures with random weights, built without a download: the zoo's (`python -m benchmarks.zoo`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.models import MobileNetV2, resnet50, wrn_16_2

Example = dict[str, Tensor] | tuple[Tensor, ...]

# fmt: off
TIMM = [
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "ecaresnet26t", "resnetv2_50",
    "regnetx_008", "regnety_008", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_s", "mnasnet_100",
    "mixnet_s", "ghostnet_100", "fbnetc_100", "tinynet_a", "lcnet_050", "hrnet_w18_small", "dla34", "densenet121",
    "inception_v3", "darknet53", "cspresnet50", "repvgg_a0", "convnext_atto", "convnextv2_atto",
    "convmixer_768_32", "poolformer_s12", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224", "mobilevit_xxs", "mobilevitv2_050", "levit_128s", "efficientformer_l1",
    "mixer_s32_224", "nfnet_l0", "xcit_nano_12_p16_224", "fastvit_t8", "skresnet18", "wide_resnet50_2",
    "vgg11_bn",
]
TORCHVISION = [
    "squeezenet1_1", "googlenet", "shufflenet_v2_x1_0", "mobilenet_v3_small", "efficientnet_b0",
    "regnet_y_400mf", "densenet121", "mnasnet0_5", "swin_t", "resnet18", "alexnet", "vit_b_32",
]
# fmt: on
SEGMENTATION = ("Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "MAnet", "PAN")
_TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "roberta": ("Roberta", _TEXT),
    "electra": ("Electra", {**_TEXT, "embedding_size": 64}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 64}),
    "distilbert": ("DistilBert", {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 512}),
    "gpt2": ("GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512}),
    "mpnet": ("MPNet", _TEXT),
}


LARGE = ("timm/vgg11_bn", "timm/wide_resnet50_2", "torchvision/alexnet", "torchvision/vit_b_32")
SMALL_SIDE = 96  # of images that only show whether an answer is right


def preload() -> None:
    """Imports the packages that are installed."""
    _import_torchvision()
    for package in ("torchvision", "timm", "segmentation_models_pytorch", "transformers"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)


def _timm(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import timm

    model: Any = timm.create_model(name, pretrained=False)
    size = model.default_cfg["input_size"]
    side = size[1] if model.default_cfg.get("fixed_input_size") else min(size[1], 160)
    return model, (torch.randn(1, 3, side, side),)


def _torchvision(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import torchvision

    options = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options), (torch.randn(1, 3, 224, 224),)


def _segmentation(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=4), (torch.randn(1, 3, 128, 128),)


def _transformers(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()  # which transformers imports where it is installed
    import transformers

    kind, sizes = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=1000, **sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    ids = torch.randint(5, 1000, (1, 64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder(name: str) -> tuple[nn.Module, Example]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, activation=name)
    return nn.TransformerEncoder(layer, 2), (torch.randn(1, 64, 128),)


def _import_torchvision() -> None:
    """Also a wheel for another build of torch, whose own operators do not load: no network here calls them, but
    torchvision describes them when it is imported."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _DEFINED:
        return  # whoever imports it says so
    libraries = list(Path(found.origin).parent.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        _DEFINED.append(torch.library.Library("torchvision", "DEF"))
        for name in _OPERATORS:
            _DEFINED[0].define(f"{name}(Tensor x) -> Tensor")


_DEFINED: list[torch.library.Library] = []
_WITH_GRADIENTS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_OPERATORS = ("nms", "qnms", *_WITH_GRADIENTS, *(f"_{name}_backward" for name in _WITH_GRADIENTS))
_IMAGE, _SMALL = (1, 3, 224, 224), (1, 3, 32, 32)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "sparsekd/resnet50": lambda: (resnet50(), (torch.randn(_IMAGE),)),
    "sparsekd/wrn_16_2": lambda: (wrn_16_2(), (torch.randn(_SMALL),)),
    "sparsekd/mobilenetv2": lambda: (MobileNetV2(), (torch.randn(_IMAGE),)),
    **{f"torch/encoder_{name}": partial(_encoder, name) for name in ("relu", "gelu")},
    **{f"timm/{name}": partial(_timm, name) for name in TIMM},
    **{f"torchvision/{name}": partial(_torchvision, name) for name in TORCHVISION},
    **{f"smp/{name}": partial(_segmentation, name) for name in SEGMENTATION},
    **{f"hf/{name}": partial(_transformers, name) for name in TRANSFORMERS},
}


def build(name: str, small: bool = False) -> tuple[nn.Module, Example]:
    """A network in eval mode and what it is called with. small: images of few pixels, where it takes them."""
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    model.eval()
    example = _smaller(model, example) if small else example
    _settle(model, example)
    return model, example


def _settle(model: nn.Module, example: Example) -> None:
    """Gives batch norms the statistics of some random inputs, as training would. With those of a fresh network values
    grow from layer to layer, until the gates of some networks see nothing but millions."""
    norms = [one for one in model.modules() if isinstance(getattr(one, "running_var", None), Tensor)]
    if not norms:
        return
    assert isinstance(example, tuple), "images"
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # type: ignore[assignment]
    call(model, tuple(torch.randn((4, *x.shape[1:])) for x in example))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def _smaller(model: nn.Module, example: Example) -> Example:
    if not isinstance(example, tuple) or example[0].dim() != 4 or example[0].shape[-1] <= SMALL_SIDE:
        return example
    smaller = (example[0][..., :SMALL_SIDE, :SMALL_SIDE].contiguous(),)
    try:
        call(model, smaller)
    except Exception:  # the size of its images is part of the network
        return example
    return smaller


def call(model: Callable[..., Any], example: Example) -> Any:
    with torch.no_grad():
        return model(**example) if isinstance(example, dict) else model(*example)
