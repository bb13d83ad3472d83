"""TGV-KV scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.text_attention import text_attention


class TGVKV(Scorer):
    """Text before images, and of images what prominent text attends to (TGV-KV, arXiv 2606.03075).

    With A the attention of the window's text, averaged over all heads of a layer, the prominence of a text token t is
    p_t = mean of A_it over the text i from t on. An image's token scores sum_t p_t A_tj (text-weighted ranking). A
    text's token scores the attention that it gets and a constant more, so that text is evicted last (text-prioritised
    retention). All heads of a layer keep the same entries. In a prompt without images all tokens are text.

    What differs: the authors read all text behind the image, here the last `window` queries; and a text's score is the
    sum over all queries, of which text counts here. While the answer is generated they evict one more token per step.

    Args:
        window: number of last prompt queries.
    """

    status = "description"
    needs = frozenset({"is_image"})

    def __init__(self, window: int = 64) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: TGV-KV needs at least one query")
        self.window = window

    def forward(self, obs: Observation) -> Tensor:
        if not obs.aligned:
            raise UserError("TGVKV: which entries are images is not known after heads have evicted: evict_interval=0")
        weights, _ = obs.window_attention(self.window)
        queries = obs.query_positions[:, -self.window :]
        by_head, is_text, is_image = text_attention(weights, queries, obs.valid, obs.is_image)
        attention = by_head.mean(1)  # [B, W, S]
        own = attention[..., attention.shape[-1] - attention.shape[1] :]  # [B, W, W], to the window's own entries
        later = is_text.flip(-1).cumsum(-1).flip(-1).clamp_min(1)  # text from each token on
        prominence = own.sum(1).masked_fill(~is_text, 0.0) / later
        of_images = torch.einsum("bw,bws->bs", prominence, attention)
        of_text = attention.sum(1) + self.window
        return torch.where(is_image, of_images.unsqueeze(1), of_text.unsqueeze(1)).float().expand(obs.valid.shape)
