"""Layers that keep everything, by what each gains an answer."""

from torch import Tensor

from learnkv.core.allocator import Allocator, entries_of
from learnkv.errors import UserError
from learnkv.formats import layers
from learnkv.formats.files import locate
from learnkv.ops.whole_or_short import whole_or_short


class NLLLayers(Allocator):
    """Layers that lower an answer's loss most keep the prompt, the others sinks and a window (arXiv 2606.27791).

    A layer's gain is the likelihood that answers win where it alone attends to everything, measured once per model. The
    authors let a quarter of the layers read the prompt with full attention, the others with a window of 2,048 tokens,
    and keep all keys for decoding; here layers evict, and as many keep everything as the budget allows. Only a
    description is public. Belongs on scores that rank the first `sink` tokens and then the latest (`StreamingLLM`).

    Args:
        gains: JSON list of one gain per layer, or `reference`.
        sink: first tokens of the other layers.
        recent: latest tokens of the other layers.
    """

    status = "description"
    table_argument = "gains"
    static = True

    def __init__(self, gains: str = "reference", sink: int = 4, recent: int = 2048) -> None:
        super().__init__()
        if min(sink, recent) < 1:
            raise UserError(f"sink={sink} recent={recent}: expected at least one token")
        self.source, self.sink, self.recent = gains, sink, recent
        self.gains: Tensor  # [L] float64
        self.register_buffer("gains", layers.read(locate(gains, "layer_gains.json")), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        if len(self.gains) != len(scores):
            raise UserError(
                f"gains={self.source}: holds {len(self.gains)} layers, the model has {len(scores)}; "
                "learnkv calibrate model=MODEL out=FOLDER only=layer_gains makes the file of another model"
            )
        entries = entries_of(scores).double()
        need = self.gains.unsqueeze(-1).expand(-1, len(entries))
        short = entries.clamp(max=self.sink + self.recent)
        return whole_or_short(need, budget.double(), entries, short).unsqueeze(-1).expand(scores.shape[:3])
