"""Models by name and pictures by file name, for the command line."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# ImageNet's channel means and deviations, in [0, 1]: what torchvision's and timm's MobileNet weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line to show."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unknown(spec: str, known: Iterable[str]) -> InputError:
    family, name = spec.split(":", 1)
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; near: {', '.join(f'{family}:{n}' for n in near)}" if near else ""
    return InputError(f"unknown model {spec!r}{hint}")


def load_model(spec: str) -> tuple[nn.Module, int]:
    """The eval-mode model that `spec` names, with random weights, and the image size it is made for.

    `spec` is builtin:mobilenet_v2, builtin:mobilenet_v1, torchvision:NAME or timm:NAME.
    """
    family, colon, name = spec.partition(":")
    if not colon or not name or family not in ("builtin", "torchvision", "timm"):
        raise InputError(f"model must be builtin:NAME, torchvision:NAME or timm:NAME, got {spec!r}")
    if family != "builtin" and importlib.util.find_spec(family) is None:
        raise InputError(f"{spec} needs {family}, which is not installed (pip install {family})")
    torch.manual_seed(0)
    size = 224
    if family == "builtin":
        from .. import models

        builtin: dict[str, Callable[[], nn.Module]] = {
            "mobilenet_v1": models.mobilenet_v1,
            "mobilenet_v2": models.mobilenet_v2,
        }
        if name not in builtin:
            raise _unknown(spec, builtin)
        model: nn.Module = builtin[name]()
    elif family == "torchvision":
        from torchvision import models as zoo

        if name not in zoo.list_models():
            raise _unknown(spec, zoo.list_models())
        # weights_backbone: detection and segmentation models would download a backbone by default.
        extra = {"weights_backbone": None} if name not in zoo.list_models(module=zoo) else {}
        model = zoo.get_model(name, weights=None, **extra)
    else:
        import timm

        if not timm.is_model(name):
            raise _unknown(spec, timm.list_models())
        model = timm.create_model(name, pretrained=False)
        defaults: dict[str, Any] = getattr(model, "default_cfg", {})
        size = defaults.get("input_size", (3, size, size))[-1]
    return model.eval(), size


def load_weights(model: nn.Module, file: str) -> None:
    """Load a `state_dict` that `torch.save` wrote (alone, or under the key "state_dict") into `model`."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read weights {file}: {error.strerror or _one_line(error)}") from error
    except Exception as error:  # torch.load raises many kinds for files that are not its own
        reason = f"{type(error).__name__}: {_one_line(error)[:120]}"
        raise InputError(f"{file} is no file of weights that torch.load can read ({reason})") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{file} holds no state_dict, but {type(loaded).__name__}")
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:
        raise InputError(f"the weights in {file} do not fit the model: {_one_line(error)[:200]}") from error


def load_pictures(files: Sequence[str], size: int) -> Tensor:
    """Pictures as [len(files), 3, size, size], normalised as ImageNet: short side to 8/7 size, then the centre."""
    if importlib.util.find_spec("PIL") is None:
        raise InputError("reading pictures needs Pillow, which is not installed (pip install pillow)")
    from PIL import Image, UnidentifiedImageError

    pictures = []
    for file in files:
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except UnidentifiedImageError as error:
            raise InputError(f"{file} is no picture that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"cannot read picture {file}: {_one_line(error)}") from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for broken files
            reason = getattr(error, "strerror", None) or _one_line(error)
            raise InputError(f"cannot read picture {file}: {reason}") from error
        scale = size * 8 / 7 / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        picture = picture.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pictures.append(pixels.view(size, size, 3).permute(2, 0, 1).float() / 255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(pictures) - mean) / std


def random_pictures(batch: int, size: int, seed: int = 0) -> Tensor:
    """[batch, 3, size, size] of standard normal numbers smoothed at two scales, so that images differ as images do."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(batch, 3, size, size, generator=generator)
    coarse = torch.randn(batch, 3, max(1, size // 32), max(1, size // 32), generator=generator)
    return 0.5 * fine + nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)


def randomise_batch_norm(model: nn.Module, size: int, seed: int = 0) -> None:
    """Give an untrained network BatchNorms as a trained one has, in place, so that its activations are alive.

    Untrained running statistics (0 and 1) let activations fade or explode over fifty layers, and errors measured on
    them mean nothing. Scales and shifts are drawn at random, so that ReLU6 cuts about 20 % of the values below and 1 %
    above; the running statistics are then measured on random pictures, layer after layer. With smaller shifts a random
    network multiplies every error on its way (four times at 224x224), which no trained network does.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    generator = torch.Generator().manual_seed(seed)
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(torch.empty(norm.num_features).uniform_(0.5, 2.5, generator=generator))
                norm.bias.copy_(torch.empty(norm.num_features).normal_(1.5, 1.0, generator=generator))
            norm.train()
            norm.momentum = 1.0  # the running statistics become this one batch's
        device, dtype = next((p.device, p.dtype) for p in model.parameters())
        model(random_pictures(4, size, seed + 1).to(device, dtype))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def block_inputs(model: nn.Module, paths: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """What each module of `paths` gets as its input when the unfused `model` runs on `x`.

    Modules that do not run, or take anything but one tensor, are left out.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def listen(path: str) -> None:
        def hook(_: nn.Module, inputs: tuple[object, ...]) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor):
                seen[path] = inputs[0].clone()  # a later in-place operation must not reach it

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))

    for path in paths:
        listen(path)
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen
