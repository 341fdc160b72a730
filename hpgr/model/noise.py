"""Dropout whose masks do not depend on how a batch is divided among workers.

A pool of random numbers is drawn once a step from (seed, stage, step), alike on every worker; each row reads
its own slice of it for each dropout site, at an offset hashed from (step, site, row). A row's mask is then a
function of the row and the step alone: one worker or eight, resumed or not, the loss curve is the same.
Slices of different rows may overlap, shifted; ours [D], in place of per-worker generators.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpgr.schema import Ints

POOL = 1 << 20
LEVELS = 1 << 16
"""Rates of dropout are multiples of 1 / LEVELS, to which they are rounded."""
U64 = npt.NDArray[np.uint64]


def _mix(x: U64) -> U64:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class Noise:
    """Source of dropout masks for one step.

    Args:
        seed: of the step; equal on all workers.
        key: [B] identity of each row.
        row_places: most places of a row at any site (tokens * width); sets the pool's size.
        device: where masks are needed.
    """

    def __init__(self, seed: int, key: Ints, row_places: int, device: torch.device | str = "cpu") -> None:
        size = max(POOL, 1 << (2 * row_places - 1).bit_length())
        self._pool = _drawn(size, seed & (2**63 - 1), torch.device(device))
        # One range of starts for all shapes: a batch with less padding must read the same slices.
        self._row_places, self._starts = row_places, np.uint64(size - row_places + 1)
        self._key = key.view(np.uint64) ^ np.uint64(seed & (2**63 - 1))

    def drop(self, x: Tensor, p: float, site: int) -> Tensor:
        """Dropout of [B, T, C] values with rate p; sites are numbered so that no two share masks."""
        if p == 0:
            return x
        rows, width = x.shape[0], x[0].numel()
        assert width <= self._row_places, f"got {width} places a row, expected at most {self._row_places}"
        with np.errstate(over="ignore"):
            hashed = _mix(self._key + np.uint64(site + 1) * np.uint64(0x9E3779B97F4A7C15))
        start = torch.from_numpy((hashed % self._starts).astype(np.int64)).to(x.device)
        kept = max(1, LEVELS - round(p * LEVELS))
        keep = self._pool.unfold(0, width, 1)[start].view(rows, *x.shape[1:]) <= kept - LEVELS // 2 - 1
        return x * keep.to(x.dtype) * (LEVELS / kept)


def _drawn(size: int, seed: int, device: torch.device) -> Tensor:
    """[size] 16-bit integers, all values alike likely; drawn where they are needed, for a copy would take longer."""
    if device.type == "cpu":
        raw = np.random.SFC64(seed).random_raw(size // 4)  # a tenth of the time that torch takes for floats
        return torch.from_numpy(np.asarray(raw).view(np.int16))
    generator = torch.Generator(device).manual_seed(seed)
    half = LEVELS // 2
    return torch.randint(-half, half, (size,), dtype=torch.int16, generator=generator, device=device)


class Dropout(nn.Module):
    """A dropout site. Sites are numbered per model by `number_sites`; without noise it does nothing."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.site = p, 0

    def forward(self, x: Tensor, noise: Noise | None, stream: int = 0) -> Tensor:
        """Drop values of [B, T, C]; history and candidates pass different `stream` numbers."""
        return x if noise is None or not self.training else noise.drop(x, self.p, 2 * self.site + stream)


def number_sites(model: nn.Module) -> None:
    """Give every dropout site of a model its own number, in definition order."""
    for site, module in enumerate(m for m in model.modules() if isinstance(m, Dropout)):
        module.site = site
