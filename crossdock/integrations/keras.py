"""A Keras 3 layer around `crossdock.MoE`, on the torch and the TensorFlow backend, in one process (docs/keras.md).

On the torch backend the layer is a part of torch's graph. On TensorFlow tensors cross by DLPack, without a copy where
the device and their alignment allow it, and the gradient is a `tf.custom_gradient` whose backward pass computes the
layer again. Experts do not spread over processes here: Keras has no place for the process group that this needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.dlpack import to_dlpack

from crossdock.moe import MoE, finish_step
from crossdock.moe_config import MoEConfig
from crossdock.routing import RouterConfig

__all__ = ["MoELayer"]

_BACKENDS = ("torch", "tensorflow")
_EXPERT_BIAS = "router.expert_bias"
# TensorFlow ends the process where a tensor's memory begins elsewhere.
_ALIGNMENT = 64


@keras.saving.register_keras_serializable(package="crossdock")
class MoELayer(keras.Layer):
    """A Mixture-of-Experts feed-forward layer, `[..., H] -> [..., H]`.

    Its weights are Keras weights, so that any Keras optimizer trains them and `save` keeps them. Auxiliary losses of
    `config` reach the weights by their gradient, as everywhere in crossdock; they are not a part of the loss that Keras
    shows.

    Args:
        num_experts: `E`.
        top_k: `K`, experts per token.
        intermediate_size: `I`, of each expert.
        config: of the layer; settings about ranks have no effect. A dict of them, too.
        router: more of `RouterConfig`, such as `score_function`.
        **layer: of `keras.Layer`.

    Raises:
        ValueError: on another backend than torch and TensorFlow.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        *,
        config: MoEConfig | dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(**layer)
        if keras.config.backend() not in _BACKENDS:
            raise ValueError(
                f"crossdock's Keras layer runs on the backends {' and '.join(_BACKENDS)}, not on "
                f"{keras.config.backend()}; set KERAS_BACKEND before keras is imported"
            )
        self.num_experts, self.top_k, self.intermediate_size = num_experts, top_k, intermediate_size
        self.moe_config = MoEConfig(**config) if isinstance(config, dict) else config or MoEConfig()
        self.router_settings = dict(router or {})
        self.supports_masking = False
        self.supports_jit = False  # XLA cannot call torch, and torch.compile leaves the layer as it is.
        # A list hides the module from Keras, which would count its parameters beside the weights.
        self._hidden: list[MoE] = []

    def build(self, input_shape: Sequence[int | None]) -> None:
        hidden_size = input_shape[-1]
        if hidden_size is None:
            raise ValueError(f"the last dimension of the input must be known; its shape is {tuple(input_shape)}")
        router = RouterConfig(num_experts=self.num_experts, top_k=self.top_k, **self.router_settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.getrandbits(32))  # as keras.utils.set_random_seed says, on any backend
            module = MoE(hidden_size, self.intermediate_size, router, self.moe_config)
        self._hidden.append(module)
        self._names = [name for name, _ in module.named_parameters()]
        self._weights_of_module = [self._weight_of(name, value) for name, value in module.named_parameters()]
        bias = module.router.expert_bias
        self._expert_bias = None
        if bias is not None:
            # Its steps of 1e-3 would be rounded away in a narrower type.
            self._expert_bias = self._weight_of("expert_bias", bias, trainable=False, dtype="float32", autocast=False)
            self._names.append(_EXPERT_BIAS)
        super().build(input_shape)

    def _weight_of(self, name: str, value: Tensor, **settings: Any) -> Any:
        def initial(shape: Any, dtype: Any = None) -> Any:
            return keras.ops.convert_to_tensor(value.detach().numpy(), dtype=dtype)

        return self.add_weight(tuple(value.shape), initial, name=name.replace(".", "_"), **settings)

    @property
    def module(self) -> MoE:
        """The layer behind this one; its own parameters are not those that are trained."""
        return self._hidden[0]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        bias = [] if self._expert_bias is None else [self._expert_bias]
        values = [variable.value for variable in (*self._weights_of_module, *bias)]
        if keras.config.backend() == "torch":
            return self._compute(inputs, values, bool(training))
        return _on_tensorflow(self._compute, inputs, values, bool(training))

    def _compute(self, x: Tensor, values: Sequence[Tensor], training: bool) -> Tensor:
        """`x` through the layer with these values of `_names`."""
        if x.is_meta:  # Keras asks for shapes in this way.
            return torch.empty_like(x)
        if next(self.module.buffers()).device != x.device:
            self.module.to(x.device)
        self.module.train(training)
        return functional_call(self.module, dict(zip(self._names, values, strict=True)), (x,))

    def finish_step(self) -> None:
        """After an optimizer step of a layer with an expert bias: moves the bias, and starts counting anew.

        Raises:
            RuntimeError: for a layer that has not seen an input yet.
        """
        if not self.built:
            raise RuntimeError(f"{self.name}: finish_step comes after a step, and the layer is not built yet")
        bias, own = self._expert_bias, self.module.router.expert_bias
        if bias is not None:
            own.copy_(torch.from_numpy(np.array(keras.ops.convert_to_numpy(bias))))  # which may be of a file
        finish_step(self.module)
        if bias is not None:
            bias.assign(own.cpu().numpy())

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("num_experts", "top_k", "intermediate_size")}
        return super().get_config() | sizes | {"config": asdict(self.moe_config), "router": self.router_settings}


def _on_tensorflow(
    compute: Callable[[Tensor, Sequence[Tensor], bool], Tensor], inputs: Any, values: Sequence[Any], training: bool
) -> Any:
    """`compute(inputs, values, training)` as an op of TensorFlow, in eager mode and in a graph."""
    import tensorflow as tf  # type: ignore[import-not-found]

    def forward(x: Any, *values: Any) -> tuple[Any, Any]:
        state = torch.get_rng_state()
        with torch.no_grad():
            output = compute(_to_torch(x), [_to_torch(value) for value in values], training)
        return _to_tensorflow(output), _to_tensorflow(state)

    def backward(gradient: Any, state: Any, x: Any, *values: Any) -> list[Any]:
        leaves = [_to_torch(tensor).detach().requires_grad_() for tensor in (x, *values)]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(_to_torch(state))  # noise is that of the forward pass
            output = compute(leaves[0], leaves[1:], training)
        found = torch.autograd.grad(output, leaves, _to_torch(gradient), allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return [_to_tensorflow(torch.zeros_like(leaf) if grad is None else grad) for grad, leaf in pairs]

    @tf.custom_gradient
    def run(*tensors: Any) -> Any:
        output, state = tf.py_function(forward, tensors, (tensors[0].dtype, tf.uint8))
        output.set_shape(tensors[0].shape)

        def gradients(gradient: Any) -> Any:
            found = tf.py_function(backward, (gradient, state, *tensors), [tensor.dtype for tensor in tensors])
            for grad, tensor in zip(found, tensors, strict=True):
                grad.set_shape(tensor.shape)
            return found

        return output, gradients

    return run(tf.convert_to_tensor(inputs), *map(tf.convert_to_tensor, values))


def _to_torch(tensor: Any) -> Tensor:
    return torch.from_dlpack(tensor)


def _to_tensorflow(tensor: Tensor) -> Any:
    import tensorflow as tf  # type: ignore[import-not-found]

    tensor = tensor.detach().contiguous()
    return tf.experimental.dlpack.from_dlpack(to_dlpack(tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor))
