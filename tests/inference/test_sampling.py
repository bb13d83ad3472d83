"""How the next token is chosen."""

import torch

from learnkv.inference.sampling import Sampling, next_token


def test_drawing_is_what_torch_draws() -> None:
    logits = torch.randn(400, 97, generator=torch.Generator().manual_seed(1)) * 3
    how = Sampling(do_sample=True, temperature=1.3, seeded=True)
    ours, largest = next_token(logits, how, torch.Generator().manual_seed(2))
    ordered, order = (logits / 1.3).sort(dim=-1, descending=True)
    drawn = torch.multinomial(ordered.softmax(-1), 1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours, order.gather(1, drawn)[:, 0])
    assert torch.equal(largest, ordered[:, 0])
    logits[3, 50] = torch.nan
    for chosen in (how, Sampling()):
        found = next_token(logits, chosen, None)[1].isnan()
        assert found.nonzero().tolist() == [[3]]
