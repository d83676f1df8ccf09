"""What the tests of deployment share: a module that no graph holds."""

from __future__ import annotations

import pytest
from torch import Tensor, nn


class _Looped(nn.Module):
    """Its Python runs as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = self.inner(x).relu()
        return x


@pytest.fixture(scope="session")
def looped() -> type[nn.Module]:
    """A module that stays opaque, since it reads data, for inputs ``[batch, 8]``."""
    return _Looped
