"""Scorers that read tokens one by one, with their per-token features in the feature cache."""

from abc import abstractmethod

import torch
from torch import Tensor

from learnkv.core.component import class_path
from learnkv.core.feature_cache import CachedFeatures, FeatureKey
from learnkv.core.observation import CaptureSpec, HiddenSample, Observation, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.checksum import checksum
from learnkv.ops.sampled_gradient import sampled_gradient


class Tokenwise(Scorer):
    """A scorer that reads tokens one by one: their hidden states, or the keys and values of all heads at once.

    Hidden states of a whole prompt are larger than its keys and values. So `token_features` is called on every chunk
    when it is read, and the features are kept with the entries instead, also during decoding, when entries are scored
    again and hidden states are gone. Where the scorer is trained, the hidden states of a sample of tokens are kept
    beside them, for gradients. Features made with other weights are refused: the prompt must be read again.
    """

    _reads_hidden: bool | None = None
    _checksum: tuple[object, int] | None = None

    @abstractmethod
    def token_features(self, obs: Observation) -> Tensor:
        """[B, H, S, F] float32, or [B, 1, S, F] where all heads share them, from each token alone."""

    def _caches_features(self, hidden: bool) -> None:
        """Cache `token_features`, which read hidden states, or keys and values only."""
        self._reads_hidden = hidden

    @property
    def feature_key(self) -> FeatureKey:
        """Equal for scorers that compute the same features."""
        return FeatureKey(repr((class_path(self), self.spec())), self._weights_checksum())

    def _weights_checksum(self) -> int:
        """Checksum of the parameters, computed again only after one of them was changed in place or replaced."""
        weights = list(self.parameters())
        state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self._checksum is None or self._checksum[0] != state:
            self._checksum = (state, checksum(weights))
        return self._checksum[1]

    @property
    def _features(self) -> CachedFeatures:
        assert self._reads_hidden is not None
        return CachedFeatures(self.feature_key, self.token_features, self._reads_hidden)

    @property
    def _trained(self) -> bool:
        """Whether features may have gradients."""
        return any(weight.requires_grad for weight in self.parameters())

    @property
    def own_capture_spec(self) -> CaptureSpec:
        if not self._reads_hidden:
            return super().own_capture_spec
        sample = HiddenSample() if self._trained else None
        return super().own_capture_spec | CaptureSpec(statistics=frozenset({self._features}), sample=sample)

    @property
    def own_decode_capture(self) -> frozenset[Statistic]:
        if self._reads_hidden is None:
            return super().own_decode_capture
        return super().own_decode_capture | {self._features}

    def cached_features(self, obs: Observation) -> Tensor:
        """`token_features` of all entries, as they were computed when the tokens were read.

        Raises:
            UserError: for a prompt that was read with other weights, or without the sample that gradients need.
        """
        features = obs.statistics.get(self._features)
        if obs.aligned and (not self._reads_hidden or (features is None and obs.hidden is not None)):
            return self.token_features(obs)
        if features is None:
            raise UserError(f"{type(self).__name__}: its weights have changed since the prompt was read; read it again")
        if not (obs.aligned and torch.is_grad_enabled() and self._trained):
            return features
        if obs.sample is None:
            raise UserError(f"{type(self).__name__}: is trained, and was not when the prompt was read: read it again")
        slots = obs.sample.slots(features.shape[2]).to(features.device)
        sampled = self.token_features(obs.of_tokens(slots, obs.statistics[obs.sample]))
        return sampled_gradient(features, sampled, slots)
