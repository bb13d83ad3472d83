"""Fast KVzip's gate."""

import dataclasses
import tempfile

import torch

from learnkv.formats import tensors
from support.originals.comparing import assert_scores
from support.originals.loading import Case, observation, policy


def check_gate(case: Case) -> None:
    hidden = torch.from_numpy(case["hidden"]).unsqueeze(0)
    blank = torch.zeros(1, case.params["nhead"], hidden.shape[1], 4)
    obs = dataclasses.replace(observation(blank[:, :, :0], blank, blank), hidden=hidden)
    stored = {name: torch.from_numpy(case.shared[name.replace(".", "_")]) for name in tensors.KVZIP_GATE}
    for bias, output in (("once", "score"), ("twice", "score_train")):
        with tempfile.TemporaryDirectory() as folder:
            file = tensors.write(f"{folder}/gate.safetensors", tensors.stack([stored]))
            gate = policy("fast_kvzip", scorer={"gate": str(file), "bias": bias})
        assert_scores(gate.scorer(obs)[0].numpy(), case[output], rtol=1e-4)


FAMILIES = {"fastkvzip_gate": check_gate}
