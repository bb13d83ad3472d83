"""Rotation and output projection of an attention layer, found by applying the layer to known inputs."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import DynamicCache

from learnkv.core.observation import Embeddings
from learnkv.errors import UserError
from learnkv.inference.layer_arguments import embeddings_of
from learnkv.inference.rope_conventions import Convention, candidates
from learnkv.ops.rotary import Layout, Rotary

CONVENTION = "_learnkv_rotation"
"""Attribute of an attached attention layer: its convention, or why it has none."""
PLAIN = "_learnkv_plain"
"""Attribute of an attached attention layer that gives the sum of its heads through `o_proj` and does nothing else."""
_TOKENS = 4  # of a probe
_AT_ONCE = 512  # unit vectors that are projected at once

Attend = Callable[[Tensor, Tensor], Tensor]
"""Attention output [1, T, H*G, D] from query and key, instead of attention."""


class ProbedLayer:
    """One attention layer while a prompt is read or planned; `LayerFunctions` of its capture.

    Args:
        module: the layer.
        given: the arguments of its forward pass, by name.
    """

    def __init__(self, module: Any, given: dict[str, Any]) -> None:
        self.module = module
        hidden = given["hidden_states"]
        self.width, self.dtype, self.device = hidden.shape[-1], hidden.dtype, hidden.device
        self.given = {name: value for name, value in given.items() if isinstance(value, str | int | float | bool)}
        self.expected = [name for name in ("position_ids", "cache_position") if given.get(name) is not None]
        self.nothing = [name for name, value in given.items() if value is None]
        self.shared = [name for name, value in given.items() if isinstance(value, MutableMapping)]
        self.example = _last_tokens(embeddings_of(given))
        self.matrix: Tensor | None = None

    def prepare(self, functions: Iterable[str]) -> None:
        """Find `rotation` and `projection` now; what is not found is refused when it is used."""
        for name in functions:
            with suppress(UserError):
                self.convention() if name == "rotation" else self.projection()

    def rotary(self, embeddings: tuple[Embeddings, ...], keys: Tensor) -> Rotary:
        """The rotation of all slots, as `embeddings` of their chunks describe it; `keys` [B, H, S, D].

        Raises:
            UserError: for a layer that does anything else to queries and keys before it attends.
        """
        convention = self.convention()
        if convention.layout is None:
            layout = Layout.halves(keys.shape[-1] // 2)
            ones = torch.ones(1, 1, 1, device=keys.device).expand(1, keys.shape[2], layout.pairs)
            return Rotary(((ones, torch.zeros_like(ones)),), layout)
        return Rotary(tuple(convention.pairs(part) for part in embeddings), convention.layout)

    @torch.no_grad()
    def convention(self) -> Convention:
        """The layer's convention; it is found once per attached layer."""
        name = type(self.module).__name__
        convention: Convention | str | None = vars(self.module).get(CONVENTION)
        if convention is None:
            if any(isinstance(weight, DTensor) for weight in self.module.parameters()):
                self._refuse_sharded("rotation")
            convention = self._find_convention(self.example)
            setattr(self.module, CONVENTION, convention)
        if isinstance(convention, str):
            raise UserError(f"{name}: queries and keys before rotation are not known: {convention}")
        return convention

    def _find_convention(self, example: Embeddings | None) -> Convention | str:
        if example is None:
            queries, keys = self._rotated(None)
            still = _close(queries, queries[:, :, :1]) and _close(keys, keys[:, :, :1])
            return Convention("single", None) if still else "it rotates or shifts them by itself"
        if example[0].ndim != 3 or len(example) > 2:
            return f"rotary embeddings of shape {tuple(example[0].shape)} are not supported"
        if self.device.type == "meta":
            return Convention("halves", Layout.halves(example[0].shape[-1] // 2))
        before = self._rotated(self._no_rotation(_TOKENS))
        if not _close(before[1], before[1][:, :, :1]):
            return "keys of equal tokens differ without rotation"
        for convention in candidates(example, before[1].shape[-1]):
            if self._holds(convention, example, before):
                return convention
        return "what it does with rotary embeddings is no rotation of pairs of channels"

    def _holds(self, convention: Convention, example: Embeddings, before: tuple[Tensor, Tensor]) -> bool:
        """Whether the layer rotates random angles, and the model's, by this convention."""
        generator = torch.Generator().manual_seed(0)
        pairs = convention.pairs(example)[0].shape[-1]
        angle = (torch.rand(1, _TOKENS, pairs, generator=generator, dtype=torch.float32) * 6).to(self.device)
        cos, sin = (part.to(convention.pairs(example)[0].dtype) for part in (angle.cos(), angle.sin()))
        own = tuple(part[:1, -_TOKENS:] for part in example)
        own = tuple(torch.cat([part[:, :1].expand(-1, _TOKENS - part.shape[1], -1), part], 1) for part in own)
        for embeddings in (convention.embeddings(cos, sin), own):
            for vectors, rotated in zip(before, self._rotated(embeddings), strict=True):
                expected = vectors
                if convention.layout is not None:
                    cos, sin = (part.unsqueeze(1).float() for part in convention.pairs(embeddings))
                    expected = convention.layout.rotate(vectors, cos, sin)
                if not _close(rotated, expected):
                    return False
        return True

    def _rotated(self, embeddings: Embeddings | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [1, N, T, D] float32 of equal tokens."""
        hidden = torch.randn(self.width, generator=torch.Generator().manual_seed(1), dtype=torch.float32).expand(
            1, _TOKENS, -1
        )
        vectors: list[Tensor] = []

        def keep(query: Tensor, key: Tensor) -> Tensor:
            vectors.extend((query.float(), key.float()))
            return torch.zeros_like(query).transpose(1, 2)

        self._run(hidden, embeddings, keep)
        queries, keys = vectors
        return queries, keys

    @torch.no_grad()
    def projection(self) -> Tensor:
        """[E, H*G*D] matrix of the map from the heads' outputs to the layer's, which includes adapters and scales.

        Raises:
            UserError: for a layer whose map is not linear or depends on its input, and for weights that FSDP has freed.
        """
        if self.matrix is None:
            if getattr(getattr(self.module, "o_proj", None), "_is_fsdp_managed_module", False):
                self._refuse_sharded("output projection")  # gathered weights are freed before a policy plans
            self.matrix = self._find_projection()
        return self.matrix

    def _find_projection(self) -> Tensor:
        if hooks := [hook for hook in self.module._forward_hooks.values() if not _only_records(hook)]:
            hook = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
            raise UserError(
                f"{type(self.module).__name__}: the policy reads the output projection, and a forward hook ({hook}) "
                "may change the layer's output: remove it"
            )
        weight = self._plain_weight()
        if weight is not None and (weight.is_meta or PLAIN in vars(self.module)):
            return weight
        name, generator = type(self.module).__name__, torch.Generator().manual_seed(2)
        heads, dim = self._rotated(self._no_rotation(_TOKENS))[0].shape[1::2]
        first, second = torch.randn(2, heads * dim, generator=generator, dtype=torch.float32)
        outputs = torch.stack([0 * first, first, second, first - 2 * second, 0 * first, first])
        hidden = torch.randn(2, self.width, generator=generator, dtype=torch.float32)[[0, 0, 0, 0, 1, 1]]
        zero, *others, other_zero, other = self._projected(outputs, hidden, dim)
        first_out, second_out, mixed = (part - zero for part in others)
        if not (_near(mixed, first_out - 2 * second_out) and _near(other - other_zero, first_out)):
            raise UserError(
                f"{name}: the policy reads the output projection, and this layer's is no linear map of attention alone "
                "(a norm or a gate comes between)"
            )
        if weight is not None and _near(first_out, weight.float() @ first.to(weight.device)):
            setattr(self.module, PLAIN, True)
            return weight
        units, rows = torch.eye(heads * dim), []
        for part in units.split(_AT_ONCE):
            rows.append(self._projected(part, hidden[:1].expand(len(part), -1), dim) - zero)
        return torch.cat(rows).T.contiguous()

    def _plain_weight(self) -> Tensor | None:
        """The weight of an output projection that is nothing but a linear layer."""
        layer = getattr(self.module, "o_proj", None)
        hooks = layer is not None and (layer._forward_hooks or layer._forward_pre_hooks)
        plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not hooks
        if layer is None or not plain or type(layer.weight) not in (nn.Parameter, DTensor):
            return None  # quantised weights are of other types
        weight: Tensor = layer.weight.detach()
        return weight

    def _projected(self, outputs: Tensor, hidden: Tensor, dim: int) -> Tensor:
        """What the layer returns [T, E] float32 where attention gives `outputs` [T, H*G*D] for tokens [T, E]."""

        def attend(query: Tensor, key: Tensor) -> Tensor:
            return outputs.to(query).view(1, len(outputs), -1, dim)

        return self._run(hidden.unsqueeze(0), self._no_rotation(len(outputs)), attend)[0].float()

    def _no_rotation(self, tokens: int) -> Embeddings | None:
        """Embeddings that rotate by no angle."""
        if self.example is None:
            return None
        first, *sines = (part[:1, :1].expand(-1, tokens, -1) for part in self.example)
        return torch.ones_like(first), *(torch.zeros_like(part) for part in sines)

    def _run(self, hidden: Tensor, embeddings: Embeddings | None, attend: Attend) -> Tensor:
        """The layer's output [1, T, E] for hidden states [1, T, E]."""
        positions = torch.arange(hidden.shape[1], device=self.device)
        own = {"position_ids": positions.unsqueeze(0), "cache_position": positions}
        given: dict[str, Any] = self.given | {name: own[name] for name in self.expected}
        if embeddings is not None:
            given["position_embeddings"] = embeddings if len(embeddings) > 1 else embeddings[0]
        given |= {name: {} for name in self.shared}
        given = dict.fromkeys(self.nothing) | given
        try:
            with evaluating(self.module):
                output = self.module.forward(
                    hidden_states=hidden.to(self.device, self.dtype),
                    **{**given, "attention_mask": None, "past_key_values": _NoCache(), "attend": attend},
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a layer raises that is called with other inputs
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
            raise UserError(f"{type(self.module).__name__} cannot be applied to other inputs ({reason})") from error
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _refuse_sharded(self, part: str) -> NoReturn:
        raise UserError(
            f"{type(self.module).__name__}: the policy reads its {part}, and its weights are shared out to several "
            "processes (fsdp)"
        )


class _NoCache(DynamicCache):
    """Returns what it is given, and has no states."""

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    get_recurrent_state = get_conv_state

    def update_conv_state(self, conv_states: Tensor, *_: Any, conv_kernel_size: int = 1, **__: Any) -> Tensor:
        return F.pad(conv_states, (max(conv_kernel_size - conv_states.shape[-1], 0), 0))

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return recurrent_states

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _last_tokens(embeddings: Embeddings | None) -> Embeddings | None:
    """As many as a probe has, of one row; all would stay in memory as long as later tokens are scored."""
    if embeddings is None or embeddings[0].ndim != 3:
        return embeddings
    return tuple(part[:1, -_TOKENS:].clone() for part in embeddings)


def _only_records(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook of a layer is one of transformers' own, which collect outputs."""
    return getattr(hook, "__module__", "").startswith("transformers.")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode within the block: no dropout."""
    trained = [part for part in module.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        yield
    finally:
        for part in trained:
            part.training = True


def _close(vectors: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding in the type of the model, half precision at worst."""
    return bool((vectors - expected).abs().max() <= 0.03 * expected.abs().max())


def _near(vectors: Tensor, expected: Tensor) -> bool:
    """Equal as a whole up to rounding."""
    return bool((vectors - expected).norm() <= 0.01 * expected.norm())
