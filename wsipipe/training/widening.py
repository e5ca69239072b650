"""Start a network as the equal of a narrower one that is trained already.

Chen et al. 2016, Net2Net, arXiv 1511.05641. Every channel becomes several copies side by side, and whoever reads a
channel reads the copies in shares that sum up to what was read before: the wide network gives the same answer as the
narrow one from the first step on. The shares are drawn, or the copies would learn the same for ever.
"""

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from wsipipe.errors import ConfigError
from wsipipe.model.attention import DeformableAttention
from wsipipe.model.cellvta import CellVTA
from wsipipe.model.encoder import Encoder, PlainViT

_SHARES = (0.2, 0.8)  # of the first of two copies


def widen(narrow: nn.Module, wide: nn.Module, seed: int = 0) -> None:
    """Give `wide` the weights that make it answer as `narrow` does.

    Both are of one architecture, round a plain ViT if they have one, tell the same classes and see cells of one size;
    every width of `wide` is a multiple of that of `narrow`, and its heads are as many. `seed` is of the shares.

    Raises
    ------
    ConfigError
        If a layer of one has no counterpart in the other, a width is no multiple, the heads or the cells differ, or the
        ViT is one whose attention knows more than queries and keys.
    """
    found, own = narrow.state_dict(), wide.state_dict()
    if missing := sorted(found.keys() ^ own.keys()):
        raise ConfigError(f"only networks of the same layers can be widened; {missing[0]} is in one of them alone")
    for name, new in own.items():
        old = found[name]
        if old.ndim != new.ndim or any(b % a for a, b in zip(old.shape, new.shape, strict=True)):
            raise ConfigError(f"{name} is {tuple(old.shape)} and cannot be widened to {tuple(new.shape)}")
    generator = torch.Generator().manual_seed(seed)
    made = {name: _copied(found[name].cpu(), new) for name, new in own.items()}
    for prefix, module in wide.named_modules():
        _require_widenable(prefix, module, narrow.get_submodule(prefix))
        reads = _input_axis(module)
        name = f"{prefix}.weight"
        if reads is not None and made[name].shape[reads] != found[name].shape[reads]:
            copies = made[name].shape[reads] // found[name].shape[reads]
            made[name] = made[name] * _shares(made[name], reads, copies, generator)
        if isinstance(module, Attention):
            # A head of r times the channels sums r times as much, and divides by a root that is sqrt(r) times as long.
            width, before = own[f"{prefix}.qkv.weight"].shape[1], found[f"{prefix}.qkv.weight"].shape[1]
            for queries in (values[:width] for key, values in made.items() if key.startswith(f"{prefix}.qkv.")):
                queries *= (width / before) ** -0.5
    wide.load_state_dict(made)


def _require_widenable(name: str, wide: nn.Module, narrow: nn.Module) -> None:
    if isinstance(wide, CellVTA) and wide.cell_px != narrow.cell_px:
        raise ConfigError(f"a network on cells of {narrow.cell_px} px cannot be widened to one of {wide.cell_px} px")
    for kind, heads in ((Attention, "num_heads"), (DeformableAttention, "heads")):
        if isinstance(wide, kind) and getattr(wide, heads) != getattr(narrow, heads):
            raise ConfigError(f"{name} has {getattr(narrow, heads)} heads and cannot be widened to another number")
    if isinstance(wide, Encoder) and not (isinstance(wide, PlainViT) and wide.rope is None):
        raise ConfigError("only networks round a plain ViT can be widened, not one with relative or rotary positions")


def _copied(old: Tensor, new: Tensor) -> Tensor:
    """`old` with every entry of every axis repeated side by side, up to the shape of `new`."""
    for axis, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)):
        if a != b:
            old = old.repeat_interleave(b // a, dim=axis)
    return old


def _input_axis(module: nn.Module) -> int | None:
    """Axis of a layer's weights along which it sums; None if it does not."""
    if isinstance(module, nn.ConvTranspose2d):
        return 0
    return 1 if isinstance(module, nn.Linear | nn.Conv2d) else None


def _shares(weights: Tensor, axis: int, copies: int, generator: torch.Generator) -> Tensor:
    """What each copy of a channel is worth to each output: they sum up to 1 over the copies."""
    low, high = _SHARES
    rows = weights.movedim(axis, 0)
    drawn = low + (high - low) * torch.rand(
        rows.shape[0] // copies, copies, *rows.shape[1:], generator=generator, dtype=weights.dtype
    )
    return (drawn / drawn.sum(1, keepdim=True)).flatten(0, 1).movedim(0, axis)
