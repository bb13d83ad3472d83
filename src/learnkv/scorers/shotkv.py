"""ShotKV scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import unit_ends
from learnkv.formats.files import locate
from learnkv.formats.unit_ends import UNITS, Unit


class ShotKV(Scorer):
    """Whole examples of a prompt, or whole sentences, by the attention to their tokens (ShotKV, arXiv 2502.01941).

    score of a unit = mean over its tokens of the sum over all heads of the layer of A_ij, averaged over the window's
    queries; all heads of a layer keep the same. Budgets are exact: of the unit that does not fit as a whole, the first
    entries stay. Source: description; which queries give the attention is not stated there, the window is our reading.
    The paper's units are the shots of a few-shot prompt, which blank lines separate, and sentences for documents. What
    it keeps of the prompt stays while tokens are generated, as here, where generated tokens stay as well; the paper
    keeps a part of these by their attention.

    Args:
        ends: JSON file with the tokens after which a unit ends (`learnkv calibrate only=unit_ends`), or `reference`.
        unit: `paragraph`, which a blank line ends, `line`, or `sentence`.
        window: number of last prompt queries.
    """

    status = "description"
    table_argument = "ends"
    needs = frozenset({"token_ids"})

    def __init__(self, ends: str = "reference", unit: Unit = "paragraph", window: int = 32) -> None:
        super().__init__()
        if unit not in UNITS or window < 1:
            raise UserError(f"unit={unit} window={window}: expected one of {', '.join(UNITS)}, and window >= 1")
        self.unit, self.window = unit, window
        read = unit_ends.read(locate(ends, "unit_ends.json"))
        self.ends, self.lines = (torch.tensor(read[name], dtype=torch.long) for name in (unit, "line"))

    def forward(self, obs: Observation) -> Tensor:
        weights, sees = obs.window_attention(self.window)  # [B, H, G, W, S], [B, H, W, S]
        mean = weights.sum(2) / sees.sum(2, keepdim=True).clamp(min=1)
        attention = mean.sum((1, 2)).float()  # [B, S]
        present, unit = obs.valid.any(1), self.units(obs)
        total = torch.zeros_like(attention).scatter_add(1, unit, attention)
        tokens = torch.zeros_like(attention).scatter_add(1, unit, present.float())
        means = total / tokens.clamp(min=1)
        # Within a unit scores fall towards that of the next best, so that heads are tied in one entry at most.
        ordered, order = means.masked_fill(tokens == 0, -1.0).sort(dim=1, descending=True, stable=True)
        following = torch.cat([ordered[:, 1:], torch.zeros_like(ordered[:, :1])], 1).clamp(min=0)
        gaps = torch.zeros_like(means).scatter_(1, order, (ordered - following).clamp(min=0))
        before = (tokens.cumsum(1) - tokens).gather(1, unit)
        place = present.cumsum(1) - 1 - before
        scores = means.gather(1, unit) - gaps.gather(1, unit) * (place / tokens.gather(1, unit).clamp(min=1))
        return scores.unsqueeze(1).expand(obs.valid.shape)

    def units(self, obs: Observation) -> Tensor:
        """Number of the unit of every slot, [B, S]."""
        assert obs.token_ids is not None
        ids, present = obs.token_ids.to(obs.keys.device), obs.valid.any(1)
        ends = torch.isin(ids, self.ends.to(ids.device)) & present
        if self.unit == "paragraph":  # a blank line may be two tokens
            breaks = torch.isin(ids, self.lines.to(ids.device)) & present
            ends[:, 1:] |= breaks[:, 1:] & breaks[:, :-1]
        begins = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        return begins.cumsum(1)
