"""What `finetune` does where its caller names neither schedule nor learning rate.

Chosen on ResNet-20 and CIFAR-10 from a trained network (88 % in floating point), 200
and 300 steps of 64 images, one seed each (``tests/benchmarks/study_short.py`` has three
seeds of the outcome; differences below 2 points are within the spread of seeds):

| choice | W1A1 % | W2A2 % |
| --- | --- | --- |
| start at the target, weights at 1e-3 | 46.2 | **78.2** |
| the same at 3e-3 | **55.7** | 76.7 |
| the same at 6e-3 | 54.8 | |
| start at 8 bits, down in half the steps, at 1e-3 | 37.4 | 71.0 |
| start one bit above, down in a fifth | 54.9 | 73.1 |
| start one bit above, down in a quarter, 300 steps | 58.8 | |
| start at the target, 300 steps | **60.1** | |
| anneal from the first tenth on instead of from half | 51.1 | |
| outliers of weights clipped at the start | 28.9 | **79.5** |
| all that, gradients aligned at the cap, with the penalty | 52.9 | 80.2 |
| the same without the penalty | **54.3** | **80.2** |
| all that, weights at 5e-4 | | 80.4 |

| all that, weights at | W3A3 % | W4A4 % |
| --- | --- | --- |
| 1e-3 | 85.5 | 86.6 |
| 5e-4 | **85.8** | |
| 3e-4 | **85.8** | 87.5 |

| W4A4 %, three seeds | at 3e-4 | at 1e-4 |
| --- | --- | --- |
| ours | 87.15 ± 0.31 | **87.32 ± 0.06** |

So a run of few hundred steps has no steps to spare for bits that it will not keep: it
starts at its target, from levels of least squared error. Longer runs may come down from
`Schedule(steps, start_bits=8)`, as the paper does over tens of thousands of steps. Bits
within a `Budget` start at a plan of them for the same reason (``planned_bits.py``).
"""

from __future__ import annotations

from statistics import median_low

from torch.fx import GraphModule

from gdnsq_fx.sites import sites, weight_sites
from gdnsq_fx.training.schedule import Schedule

LR = 1e-3
# By the target of the median weight; from 3 bits on there is little to repair, and each
# step away from the trained weights costs some of what they know.
LR_OF = {1: 3e-3, 2: 1e-3, 3: 3e-4}
LR_ABOVE = 1e-4


def default_schedule(steps: int) -> Schedule:
    """Start at the targets, or at a plan of them where there is a `Budget`."""
    return Schedule(steps, start_bits=1.0)


def default_rate(qmodel: GraphModule, *, come_down: bool) -> float:
    """Learning rate of the weights for Adam.

    Binary codes change only where a weight crosses the middle of its channel, which
    takes larger steps.

    Args:
        qmodel: a prepared model; the median target of its weights counts, so that a few
            binary ones in mixed precision do not set the pace of all.
        come_down: from the bits of the schedule to a budget, so targets are not known.
    """
    weights = weight_sites(qmodel) or sites(qmodel)
    typical = median_low(site.quantizer.spec.bits for site in weights)
    return LR if come_down else LR_OF.get(typical, LR_ABOVE)
