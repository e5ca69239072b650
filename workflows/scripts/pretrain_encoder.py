"""A small ViT that knows nuclei before the comparison of docs/replication.md begins.

    python workflows/scripts/pretrain_encoder.py PATCH_SETS OUT.safetensors

No pathology foundation model is openly licensed and small, so one is made: a plain ViT of the width of `cellvta-nano`,
whose every token says by one linear layer where the nuclei of its 16 x 16 px are and what their offsets, on data
that the comparison does not see (NuInsSeg, DSB2018, NuCLS). The linear layer is thrown away.
"""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from wsipipe.training.augment import load_recipe
from wsipipe.training.crops import MixedCrops, Source, start_worker
from wsipipe.training.data import PatchSet
from wsipipe.training.losses import CellVTALoss

SETS = {"nuinsseg": 0.8, "dsb2018_stained": 0.15, "nucls_mini": 0.05}
STEPS, BATCH, CROP_PX, RATE, SEED = 3000, 16, 128, 1e-3, 7


class TokenReader(nn.Module):
    """A plain ViT and one linear layer from a token to the maps of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=224, patch_size=16, embed_dim=64, depth=4, num_heads=4, num_classes=0, dynamic_img_size=True
        )
        self.read = nn.Linear(64, 4 * 16 * 16)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.read(self.vit.forward_features(image)[:, 1:])
        rows = image.shape[2] // 16
        maps = functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, -1)), 16)
        return {"nuclei": maps[:, :2], "offsets": maps[:, 2:], "types": torch.zeros_like(maps[:, :2])}


def main(sets: Path, out: Path) -> None:
    torch.manual_seed(SEED)
    network, criterion = TokenReader(), CellVTALoss(double_softmax=False)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    sources = [Source(PatchSet.open(sets / name), weight) for name, weight in SETS.items()]
    crops = MixedCrops(sources, load_recipe("default"), STEPS * BATCH, seed=SEED, crop_px=CROP_PX)
    loader = DataLoader(crops, BATCH, sampler=range(len(crops)), num_workers=1, worker_init_fn=start_worker)
    started, seen = time.monotonic(), 0.0
    for step, batch in enumerate(loader, 1):
        image = (batch.pop("image").float() / 255 - 0.5) / 0.5
        loss, _ = criterion(network(image), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen += loss.item()
        if step % 100 == 0:
            sys.stderr.write(f"step {step}: loss {seen / 100:.3f}, {time.monotonic() - started:.0f} s\n")
            seen = 0.0
            save_file({key: value.contiguous() for key, value in network.vit.state_dict().items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
