"""What a learned policy starts from."""

from typing import Any

from learnkv.policy.policy import Policy


def base_policy(policy: Policy) -> Policy:
    """The policy that a learned one starts from: its parts without their learned corrections."""
    return Policy(
        _without_correction(policy.scorer),
        _without_correction(policy.allocator),
        policy.sinks,
        policy.recent,
        policy.evict_interval,
        _without_correction(policy.decode),
        policy.rerotate,
        policy.pages,
        policy.read,
    )


def _without_correction(part: Any) -> Any:
    return getattr(part, "base", part) if part is not None and any(True for _ in part.parameters()) else part
