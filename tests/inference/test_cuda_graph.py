"""When a decode step is captured as a CUDA graph, and what is said where it is not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import attached, policy_for, tokens
from transformers import PreTrainedModel

from learnkv import CompressedCache, generate, prefill
from learnkv.errors import RunError, UserError
from learnkv.inference.cuda_graph import capture, refusal


def test_why_a_step_is_not_captured() -> None:
    def reason(
        family: str, cache: CompressedCache | None = None, slots: int = 9, **config: dict[str, dict[str, str]]
    ) -> str | None:
        model = OnCuda(attached(family))
        for name, value in config.items():
            setattr(model.config, name, value)
        return refusal(model, prefill(attached(family), tokens(2, 20)) if cache is None else cache, slots)

    llama = prefill(attached("llama"), tokens(2, 20))
    assert refusal(attached("llama"), llama, 9) == "the model is on cpu"
    assert reason("llama") is None
    assert "experts" in reason("mixtral")
    assert "experts" in reason("qwen3-moe")
    assert "hybrid" in reason("gemma3")
    assert reason("mistral-window") is None
    assert reason("mistral-window", slots=237) == "the sliding window of 256 tokens may be exceeded"
    assert "gated" in reason("llama", policy_for("adakv", attached("llama")).relax(llama, keep=0.5))
    assert "RoPE" in reason("llama", rope_parameters={"full_attention": {"rope_type": "longrope"}})
    with pytest.raises(UserError, match="graph=True: the model is on cpu"):
        generate(attached("llama"), tokens(2, 3), llama, max_new_tokens=3, graph=True)
    with pytest.raises(RunError, match="pass graph=False"):
        capture(lambda: None, torch.device("cuda"), None)


class OnCuda:
    """A model that says its weights are on a GPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config.__class__.from_dict(model.config.to_dict())

    def parameters(self) -> list[type[Any]]:
        return [type("Weight", (), {"device": torch.device("cuda", 0)})]

    def modules(self) -> Iterator[Any]:
        return self.model.modules()
