"""What a policy cannot have together with a residual store."""

from learnkv.cache.eviction import Rerotate
from learnkv.core.entry_selector import AnySelector
from learnkv.core.residual_store import ResidualStore
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError


def check_residual(
    residual: ResidualStore | None, scorer: Scorer | None, pages: AnySelector | None, rerotate: Rerotate | None
) -> None:
    """Raise UserError where nothing is evicted, or where kept keys are moved to other positions."""
    if residual is None:
        return
    if scorer is None or pages is not None:
        raise UserError(f"residual={residual.name}: expected a policy that evicts and reads all it keeps")
    if rerotate is not None:
        raise UserError(f"residual={residual.name} rerotate={rerotate}: not supported together")


def refuse_soft_residual(residual: ResidualStore | None, soft: bool) -> None:
    """Raise UserError where gates weigh all entries, so that none is evicted."""
    if residual is not None and soft:
        raise UserError(f"residual={residual.name}: not trained with soft gates, which evict nothing")
