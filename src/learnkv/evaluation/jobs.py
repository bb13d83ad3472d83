"""What an evaluation measures on every prompt: the full cache, then every policy at every budget."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learnkv.evaluation.budget import WHOLE, Budget
from learnkv.evaluation.keys import policy_digest
from learnkv.evaluation.results import FULL
from learnkv.evaluation.sources import rooms_digest
from learnkv.evaluation.store import SLOT
from learnkv.evaluation.tasks.base import Prompt
from learnkv.inference.digest import model_digest
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class Job:
    """A policy at a budget; without a policy, the full cache."""

    name: str
    policy: Policy | None
    budget: Budget
    digest: str
    """Hash of the conditions, the policy with its weights, and the budget."""
    conditions: str = ""
    """Hash of the model, the libraries' versions and the package's code: what all samples of a table share."""
    draft_tokens: int = 0
    """Tokens per round of lossless decoding; 0: its accepted length is not measured."""

    def fingerprint(self, prompt: Prompt) -> str:
        """Hash of everything that determines the record of this job on a prompt."""
        return hashlib.sha256(f"{self.digest}{prompt.digest}".encode()).hexdigest()[:20]

    def slot(self, prompt: Prompt) -> dict[str, Any]:
        """The keys `SLOT` of a record of this job on a prompt."""
        about = (self.name, prompt.metric, prompt.task, prompt.length, prompt.setting, prompt.index)
        budget = (self.budget.keep, self.budget.tokens, self.budget.bytes)
        return dict(zip(SLOT, (*about, *budget), strict=True))


def jobs_of(model: Any, policies: Mapping[str, Policy], budgets: Sequence[Budget], draft_tokens: int = 0) -> list[Job]:
    """The full cache, then every policy at every budget; one that evicts nothing is measured once, at keep=1.

    Args:
        draft_tokens: per round of lossless decoding; 0: its accepted length is not measured.
    """
    conditions = hashlib.sha256(f"{model_digest(model)}{rooms_digest()}".encode()).hexdigest()[:20]
    jobs = [Job(FULL, None, WHOLE, f"{conditions}{FULL}", conditions)]
    for name, policy in policies.items():
        digest = policy_digest(policy)
        own = [WHOLE] if policy.scorer is None and policy.pages is None else budgets
        drafting = f"draft {draft_tokens}" if draft_tokens else ""
        digests = {budget: f"{conditions}{digest}{budget!r}{drafting}" for budget in own}
        jobs += [Job(name, policy, budget, digests[budget], conditions, draft_tokens) for budget in own]
    return jobs
