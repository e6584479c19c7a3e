"""A Keras 3 layer around `crossdock.MoE`, on the torch and the TensorFlow backend, in one process.

On the torch backend the layer is a part of torch's graph. On TensorFlow tensors cross by DLPack, without a copy where
the device allows it, and the gradient is a `tf.custom_gradient` whose backward pass computes the layer again. Experts
do not spread over processes here: Keras has no place for the process group that this needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.dlpack import to_dlpack

from crossdock.moe import MoE, finish_step
from crossdock.moe_config import MoEConfig
from crossdock.routing import RouterConfig

__all__ = ["MoELayer"]

_BACKENDS = ("torch", "tensorflow")


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
        # A list hides the module from Keras, which would count its parameters beside the weights.
        self._hidden: list[MoE] = []

    def build(self, input_shape: Sequence[int | None]) -> None:
        hidden_size = input_shape[-1]
        if hidden_size is None:
            raise ValueError(f"the last dimension of the input must be known; its shape is {tuple(input_shape)}")
        router = RouterConfig(num_experts=self.num_experts, top_k=self.top_k, **self.router_settings)
        module = MoE(hidden_size, self.intermediate_size, router, self.moe_config)
        self._hidden.append(module)
        self._names = [name for name, _ in module.named_parameters()]
        self._weights_of_module = [self._weight_of(name, value) for name, value in module.named_parameters()]
        bias = module.router.expert_bias if module.router is not None else None
        self._expert_bias = None if bias is None else self._weight_of("expert_bias", bias, trainable=False)
        super().build(input_shape)

    def _weight_of(self, name: str, value: Tensor, *, trainable: bool = True) -> Any:
        made = self.add_weight(tuple(value.shape), "zeros", name=name.replace(".", "_"), trainable=trainable)
        made.assign(value.detach().numpy())
        return made

    @property
    def module(self) -> MoE:
        """The layer behind this one; its own parameters are not those that are trained."""
        return self._hidden[0]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        self.module.train(bool(training))
        self._give_bias()
        if keras.config.backend() == "torch":
            return self._compute(inputs, [variable.value for variable in self._weights_of_module])
        return _on_tensorflow(self._compute, inputs, self._weights_of_module, bool(training), self.module)

    def _compute(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return functional_call(self.module, dict(zip(self._names, weights, strict=True)), (x,))

    def finish_step(self) -> None:
        """After an optimizer step of a layer with an expert bias: moves the bias, and starts counting anew."""
        self._give_bias()
        finish_step(self.module)
        if self._expert_bias is not None and self.module.router is not None:
            self._expert_bias.assign(self.module.router.expert_bias.detach().cpu().numpy())  # type: ignore[union-attr]

    def _give_bias(self) -> None:
        """The bias as Keras has it, which may have loaded it."""
        if self._expert_bias is not None and self.module.router is not None:
            value = torch.tensor(np.asarray(keras.ops.convert_to_numpy(self._expert_bias)))
            self.module.router.expert_bias.copy_(value)  # type: ignore[union-attr]

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("num_experts", "top_k", "intermediate_size")}
        return super().get_config() | sizes | {"config": asdict(self.moe_config), "router": self.router_settings}


def _on_tensorflow(compute: Any, inputs: Any, variables: Sequence[Any], training: bool, module: nn.Module) -> Any:
    """`compute` as an op of TensorFlow, in eager mode and in a graph."""
    import tensorflow as tf  # type: ignore[import-not-found]

    def forward(x: Any, *weights: Any) -> Any:
        module.train(training)
        with torch.no_grad():
            return _to_tensorflow(compute(_to_torch(x), [_to_torch(weight) for weight in weights]))

    def backward(gradient: Any, x: Any, *weights: Any) -> list[Any]:
        module.train(training)
        leaves = [_to_torch(tensor).detach().requires_grad_() for tensor in (x, *weights)]
        with torch.enable_grad():
            output = compute(leaves[0], leaves[1:])
        found = torch.autograd.grad(output, leaves, _to_torch(gradient), allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return [_to_tensorflow(torch.zeros_like(leaf) if grad is None else grad) for grad, leaf in pairs]

    @tf.custom_gradient
    def run(x: Any, *weights: Any) -> Any:
        output = tf.py_function(forward, (x, *weights), x.dtype)
        output.set_shape(x.shape)

        def gradients(gradient: Any, variables: Any = None) -> Any:
            types = [tensor.dtype for tensor in (x, *weights)]
            found = tf.py_function(backward, (gradient, x, *weights), types)
            for grad, tensor in zip(found, (x, *weights), strict=True):
                grad.set_shape(tensor.shape)
            return found

        return output, gradients

    return run(inputs, *(tf.convert_to_tensor(variable.value) for variable in variables))


def _to_torch(tensor: Any) -> Tensor:
    return torch.from_dlpack(tensor)


def _to_tensorflow(tensor: Tensor) -> Any:
    import tensorflow as tf  # type: ignore[import-not-found]

    return tf.experimental.dlpack.from_dlpack(to_dlpack(tensor.detach().contiguous()))
