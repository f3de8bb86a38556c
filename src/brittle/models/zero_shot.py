"""CLIP as a classifier: features of an image against those of prompts that describe classes (Radford et al. 2021).

Networks of transformers and of open_clip are taken as they are. What comes out is an ordinary module from images to
logits, which every audit, attack and training takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import device_of, frozen


class ImageEncoder(nn.Module):
    """The image half of transformers' CLIP, from images to features.

    Attributes:
        vision_model: Its transformer.
        visual_projection: The map to the space that images and texts share.
    """

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = vision_model, visual_projection

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to features ``(N, d)``."""
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=x).pooler_output)
        return features


class ZeroShotClassifier(nn.Module):
    r"""Images to logits by the directions of classes.

    .. math:: s_k(x) = \mathrm{scale} \; \langle f(x) / \|f(x)\|_2,\ t_k \rangle

    Attributes:
        encoder: f, from images to features ``(N, d)``.
        classes: Buffer ``(K, d)``: t, rows of length 1.
        scale: Buffer: the inverse temperature.
    """

    classes: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, classes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("classes", classes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        return self.scale * F.normalize(self.encoder(x), dim=1) @ self.classes.T


def image_encoder(clip: nn.Module) -> nn.Module:
    """The half of a CLIP that reads images, sharing its weights.

    Args:
        clip: ``CLIPModel`` of transformers, or a ``CLIP`` of open_clip; alike.

    Raises:
        InputError: It is neither.
    """
    if isinstance(visual := getattr(clip, "visual", None), nn.Module):
        return visual
    parts = [getattr(clip, name, None) for name in ("vision_model", "visual_projection")]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise InputError(f"clip: expected a CLIP of transformers or of open_clip; got {type(clip).__name__}")
    return ImageEncoder(*parts)  # type: ignore[arg-type]


def text_features(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Features ``(n, d)`` of texts, differentiable.

    Args:
        clip: As :func:`image_encoder`.
        tokens: ``(n, T)``, as the network's own tokenizer numbers them.

    Raises:
        InputError: It is no CLIP.
    """
    if callable(encode := getattr(clip, "encode_text", None)):
        features: Tensor = encode(tokens)
        return features
    if not all(isinstance(getattr(clip, name, None), nn.Module) for name in ("text_model", "text_projection")):
        raise InputError(f"clip: expected a CLIP of transformers or of open_clip; got {type(clip).__name__}")
    features = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)  # type: ignore[operator]
    return features


def temperature(clip: nn.Module) -> Tensor:
    """The inverse temperature by which cosines are multiplied, at most 100 as in training; differentiable."""
    scale = getattr(clip, "logit_scale", None)
    if not isinstance(scale, Tensor):
        raise InputError(f"clip: expected a network with a logit_scale; got {type(clip).__name__}")
    return scale.exp().clamp(max=100)


def zero_shot_classifier(clip: nn.Module, prompts: Sequence[Tensor]) -> ZeroShotClassifier:
    """The classifier that a CLIP is for classes that texts describe.

    The direction of a class is the mean of the directions of its prompts, at length 1 again.

    Args:
        clip: As :func:`image_encoder`; left bit-equal. The classifier shares the weights of its image half.
        prompts: Of each class ``(n, T)`` tokens of at least one prompt.

    Returns:
        In evaluation mode; of images as the image half takes them: put a :class:`brittle.Normalize` before it.

    Raises:
        InputError: No CLIP, no class, a class without prompts, or tokens that it cannot read.
    """
    if not len(prompts) or not all(tokens.ndim == 2 and len(tokens) for tokens in prompts):
        raise InputError("prompts: expected tokens (n, T) of at least one prompt for each of at least one class")
    encoder, device = image_encoder(clip), device_of(clip)
    with frozen(clip), torch.no_grad():
        try:
            each = [F.normalize(text_features(clip, tokens.to(device)), dim=1).mean(0) for tokens in prompts]
        except (RuntimeError, IndexError, ValueError) as error:
            raise InputError(f"prompts: expected tokens that the network can read; got {error}") from error
        scale = temperature(clip)
    return ZeroShotClassifier(encoder, F.normalize(torch.stack(each), dim=1), scale.detach().clone()).eval()
