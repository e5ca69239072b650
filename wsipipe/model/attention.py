"""Multi-scale deformable attention in plain PyTorch: every query reads a few places it chooses itself.

Zhu et al. 2021, Deformable DETR, arXiv 2010.04159. No compiled operator: `grid_sample` is exact, differentiable and
runs on every device.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

Size = tuple[int, int]  # (height, width) of one level


@lru_cache(maxsize=64)
def reference_points(sizes: tuple[Size, ...], device: torch.device) -> Tensor:
    """Centre of every cell of the given grids, (1, sum of H W, 2) float32 as (x, y) in [0, 1]."""
    points = []
    for height, width in sizes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        points.append(torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1).reshape(-1, 2))
    return torch.cat(points)[None]


def sample_levels(value: Tensor, sizes: tuple[Size, ...], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of every level; zero outside.

    Parameters
    ----------
    value : (B, S, M, d) float
        Memory of all levels one behind the other, row-major, split into M heads; S = sum of H W.
    sizes : L pairs (H, W)
    locations : (B, M, L, P, Q, 2) float
        (x, y), 0 to 1 from edge to edge of a level. Queries last: a sum over few points of many queries is then a sum
        of long rows, four times as fast on a CPU.
    weights : (B, M, L, P, Q) float

    Returns
    -------
    (B, Q, M d) float
    """
    batch, heads, _, points, queries, _ = locations.shape
    locations = 2 * locations - 1
    total: Tensor | None = None
    for level, (memory, (height, width)) in enumerate(
        zip(value.split([h * w for h, w in sizes], dim=1), sizes, strict=True)
    ):
        image = memory.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = locations[:, :, level].reshape(batch * heads, points, queries, 2)
        samples = functional.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (samples * weights[:, :, level].reshape(batch * heads, 1, points, queries)).sum(2)  # (B M, d, Q)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(batch, -1, queries).transpose(1, 2)


def gather_levels(value: Tensor, sizes: tuple[Size, ...], places: Tensor, weights: Tensor) -> Tensor:
    """What `sample_levels` gives, without gradients: a weighted sum of rows of the memory as it lies.

    No head's memory is laid out as an image, and no sample is stored: `embedding_bag` reads the four pixels round every
    place and adds them up in one pass.

    Parameters
    ----------
    value : (B, S, M, d) float
    sizes : L pairs (H, W)
    places : (B, Q, M, L, P, 2) float32
        (x, y) in pixels of the level; 0 is the centre of the first.
    weights : (B, Q, M, L, P) float32

    Returns
    -------
    (B, Q, M d) of the type of `value`
    """
    batch, queries, heads = places.shape[:3]
    extent, starts = _layout(sizes, places.device)
    low = places.floor()
    share = (places - low)[..., None, :]
    corners = torch.stack((1 - share, share), dim=-1)  # (..., 1, xy, near or far)
    inner = low.to(torch.int32)[..., None] + torch.arange(2, device=places.device, dtype=torch.int32)  # (..., xy, 2)
    last = extent[:, None, :, None] - 1
    inside = (inner >= 0) & (inner <= last)
    corners = corners[..., 0, :, :] * inside
    inner = torch.minimum(inner.clamp(min=0), last)
    by_corner = weights[..., None, None] * corners[..., 1, :, None] * corners[..., 0, None, :]  # (..., y, x)
    cell = inner[..., 1, :, None] * extent[:, None, :1, None] + inner[..., 0, None, :] + starts[:, None, None, None]
    image = torch.arange(batch, device=places.device, dtype=torch.int32) * value.shape[1]
    head = torch.arange(heads, device=places.device, dtype=torch.int32)
    rows = (cell + image.view(-1, 1, 1, 1, 1, 1, 1)) * heads + head.view(-1, 1, 1, 1, 1)
    bags = batch * queries * heads
    summed = functional.embedding_bag(
        rows.reshape(bags, -1),
        value.reshape(-1, value.shape[-1]),
        mode="sum",
        per_sample_weights=by_corner.reshape(bags, -1).to(value.dtype),
    )
    return summed.view(batch, queries, -1)


@lru_cache(maxsize=64)
def _layout(sizes: tuple[Size, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(width, height) of every level (L, 2), and at which row of the memory it starts (L,)."""
    extent = torch.tensor([(w, h) for h, w in sizes], dtype=torch.int32, device=device)
    areas = extent.prod(1)
    return extent, (areas.cumsum(0) - areas).to(torch.int32)


@lru_cache(maxsize=64)
def _reference_places(query_sizes: tuple[Size, ...], sizes: tuple[Size, ...], device: torch.device) -> Tensor:
    """Where each query stands in each level, (1, Q, 1, L, 1, 2) in pixels."""
    extent = _layout(sizes, device)[0]
    return (reference_points(query_sizes, device)[:, :, None] * extent - 0.5)[:, :, None, :, None]


class DeformableAttention(nn.Module):
    """Queries (B, Q, D) read a memory (B, S, D) of one or more levels around their own place.

    `ratio` sets the width of the values, `ratio` x D over all heads. Sampling is done in float32 whatever the
    precision of the rest: places of 1/16 pixel do not survive 8 bits of mantissa.

    Attributes
    ----------
    gathers : bool
        Use `gather_levels`, which is faster but has no gradients for places.
    """

    gathers = False

    def __init__(self, dim: int, heads: int, levels: int, points: int, ratio: float) -> None:
        super().__init__()
        width = int(dim * ratio)
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a value width of {width}")
        self.heads, self.levels, self.points, self.head_width = heads, levels, points, width // heads
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)

    def reset_as_published_for_detection(self) -> None:
        """Start as Deformable DETR does: head by head in eight directions, a point farther out than the one before."""
        angle = torch.arange(self.heads) * (2 * torch.pi / self.heads)
        ring = torch.stack((angle.cos(), angle.sin()), dim=-1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        with torch.no_grad():
            for linear in (self.sampling_offsets, self.attention_weights):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
            places = (ring[:, None, None] * steps).expand(-1, self.levels, -1, -1)
            self.sampling_offsets.bias.copy_(places.reshape(-1))
            for linear in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, query_sizes: tuple[Size, ...], memory: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        batch, queries, _ = query.shape
        shape = (batch, queries, self.heads, self.levels, self.points)
        value = self.value_proj(memory).reshape(batch, memory.shape[1], self.heads, -1)
        offsets = self.sampling_offsets(query).float().reshape(*shape, 2)
        weights = self.attention_weights(query).float().reshape(batch, queries, self.heads, -1)
        if self.gathers:
            places = _reference_places(query_sizes, sizes, query.device) + offsets
            weights = weights.softmax(-1).reshape(shape)
            read: Tensor = self.output_proj(gather_levels(value, sizes, places, weights))
            return read
        weights = weights.permute(0, 2, 3, 1).softmax(2).reshape(batch, *shape[2:], queries)
        extent = offsets.new_tensor([(w, h) for h, w in sizes])[:, None, None]  # (L, 1, 1, 2)
        reference = reference_points(query_sizes, query.device)[:, None, None, None]
        with torch.autocast(query.device.type, enabled=False):
            locations = reference + offsets.permute(0, 2, 3, 4, 1, 5) / extent
            samples = sample_levels(value.float(), sizes, locations, weights)
        out: Tensor = self.output_proj(samples.to(query.dtype))
        return out
