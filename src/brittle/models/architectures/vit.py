"""A small vision transformer (Dosovitskiy et al. 2021), its parameters named as timm's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.architectures.checks import check_sizes, refuse

EPSILON = 1e-6
"""Added to the variance in every LayerNorm, as in the original."""


class Attention(nn.Module):
    r"""Self-attention of several heads over tokens ``(N, T, D)``.

    Head h has queries, keys and values :math:`Q, K, V` of ``D / heads`` columns each and gives

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{D / \mathrm{heads}})\, V
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, T, D)`` to tokens ``(N, T, D)``."""
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # (N, heads, T, T)
        tokens: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return tokens


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on every token by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, T, D)`` to tokens ``(N, T, D)``."""
        tokens: Tensor = self.fc2(self.act(self.fc1(x)))
        return tokens


class Block(nn.Module):
    """``x + attention(norm(x))``, then the same with the MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, T, D)`` to tokens ``(N, T, D)``."""
        x = x + self.attn(self.norm1(x))
        tokens: Tensor = x + self.mlp(self.norm2(x))
        return tokens


class PatchEmbedding(nn.Module):
    """One token for each square of ``patch_size`` pixels: a convolution whose stride is its kernel."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.shape = (in_channels, image_size, image_size)
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, S, S)`` to ``(N, (S / patch_size)^2, D)``; raises InputError for other images."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"x: expected (N, {', '.join(map(str, self.shape))}) for this network; got {tuple(x.shape)}"
            )
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-norm blocks, linear head; see :func:`vit`."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        classes: int,
        in_channels: int,
        class_token: bool,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + class_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.patch_embed = PatchEmbedding(image_size, patch_size, in_channels, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, EPSILON)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.pos_embed, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.detach().chunk(3 if name.endswith(".qkv") else 1):
                    nn.init.xavier_uniform_(part)  # queries, keys and values are three maps of D to D
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, S, S)`` to logits ``(N, classes)``."""
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.pos_embed))
        logits: Tensor = self.head(x.mean(1) if self.cls_token is None else x[:, 0])
        return logits


def vit(
    image_size: int = 32,
    patch_size: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    classes: int = 10,
    in_channels: int = 3,
    class_token: bool = False,
) -> nn.Module:
    """Build a vision transformer for square images (Dosovitskiy et al. 2021), without dropout.

    Every block normalises first (LayerNorm), then adds attention, then an MLP with GELU. Linear layers start from
    Glorot's uniform distribution, positions from a normal one of standard deviation 0.02.

    Args:
        image_size: Height and width of the images in pixels, a multiple of ``patch_size``.
        patch_size: Height and width of a patch in pixels; each patch is one token.
        width: Numbers in one token, D; a multiple of ``heads``.
        depth: Blocks.
        heads: Attention heads. The one argument that leaves no trace in the shapes of the weights: give it again
            whenever weights of a network with another number than the default are loaded.
        mlp_ratio: Hidden neurons of the MLPs as a multiple of ``width``, rounded.
        classes: Logits.
        in_channels: Channels of the images.
        class_token: Whether the head reads an extra token, as in the original, or the mean over all tokens (Beyer,
            Zhai and Kolesnikov 2022).

    Returns:
        A network from ``(N, in_channels, image_size, image_size)`` to logits ``(N, classes)``.

    Raises:
        InputError: A size is not a positive integer, one is not the multiple it has to be, or the MLPs are empty.

    >>> vit(image_size=8, width=16, heads=2, depth=1)(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 10])
    """
    check_sizes(
        image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads,
        classes=classes, in_channels=in_channels,
    )  # fmt: skip
    if image_size % patch_size:
        raise InputError(f"image_size: expected a multiple of patch_size, {patch_size}; got {image_size}")
    if width % heads:
        raise InputError(f"width: expected a multiple of heads, {heads}; got {width}")
    if not isinstance(mlp_ratio, int | float) or not 1 <= mlp_ratio * width < math.inf:
        raise InputError(f"mlp_ratio: expected a number that leaves at least one of {width} neurons; got {mlp_ratio!r}")
    hidden = round(mlp_ratio * width)
    return VisionTransformer(image_size, patch_size, width, depth, heads, hidden, classes, in_channels, class_token)


def vit_arguments(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of :func:`vit`, all but ``heads``, that fit the shapes in ``state``.

    Raises:
        InputError: None do.
    """
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight")
    found = [state.get(name) for name in names]
    if [None if tensor is None else tensor.ndim for tensor in found] != [4, 3, 2, 2]:
        refuse(state, "vit", ", ".join(names))
    patches, positions, hidden, head = (tensor for tensor in found if tensor is not None)
    width, in_channels, patch_size, _ = patches.shape
    class_token = "cls_token" in state
    return {
        "image_size": math.isqrt(positions.shape[1] - class_token) * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in state),
        "mlp_ratio": hidden.shape[0] / width,
        "classes": head.shape[0],
        "in_channels": in_channels,
        "class_token": class_token,
    }
