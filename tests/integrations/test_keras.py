"""The Keras layer computes what the torch layer computes, learns, and is saved; on both backends.

TensorFlow wants other versions of some packages than `constraints.txt` has: `scripts/test_tensorflow.sh` runs its tests
in an environment of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240

needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs keras")
BACKENDS = [
    "torch",
    pytest.param(
        "tensorflow",
        marks=[
            pytest.mark.tensorflow,
            pytest.mark.skipif(
                importlib.util.find_spec("tensorflow") is None,
                reason="needs tensorflow-cpu; scripts/test_tensorflow.sh has it",
            ),
        ],
    ),
]

# One process each: Keras chooses its backend when it is imported.
EQUALS_TORCH = """
import keras, numpy as np, torch
from crossdock import MoE, MoEConfig, RouterConfig
from crossdock.integrations.keras import MoELayer

layer = MoELayer(8, 2, 24, config={"batch_aux_loss_coeff": 0.1})
x = np.random.default_rng(0).standard_normal((3, 5, 16)).astype("float32")
layer.build(x.shape)
theirs = MoE(16, 24, RouterConfig(num_experts=8, top_k=2), MoEConfig(batch_aux_loss_coeff=0.1))
values = [keras.ops.convert_to_numpy(weight) for weight in layer.trainable_weights]
with torch.no_grad():
    for parameter, value in zip(theirs.parameters(), values, strict=True):
        parameter.copy_(torch.from_numpy(value.copy()))
own = torch.from_numpy(x.copy()).requires_grad_()
expected = theirs(own)
expected.square().sum().backward()
gradients = [own.grad, *(parameter.grad for parameter in theirs.parameters())]

if keras.config.backend() == "torch":
    ours = torch.from_numpy(x.copy()).requires_grad_()
    output = layer(ours, training=True)
    output.square().sum().backward()
    found = [ours.grad, *(weight.value.grad for weight in layer.trainable_weights)]
    output = output.detach()
else:
    import tensorflow as tf

    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        output = layer(variable, training=True)
        loss = tf.reduce_sum(tf.square(output))
    found = tape.gradient(loss, [variable, *(weight.value for weight in layer.trainable_weights)])
np.testing.assert_allclose(np.asarray(output), expected.detach().numpy(), rtol=1e-5, atol=1e-6)
for ours, theirs in zip(found, gradients, strict=True):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=1e-4, atol=1e-5)
print("same")
"""

# Along a random direction of the input and of all weights, the slope of differences is that of the gradient.
SLOPES = """
import keras, numpy as np
from crossdock.integrations.keras import MoELayer

rng = np.random.default_rng(0)
layer = MoELayer(6, 2, 10, router={"score_function": "sigmoid"}, dtype="float64")
try:
    layer.finish_step()
except RuntimeError as error:
    assert "the layer is not built yet" in str(error)
else:
    raise AssertionError("a layer that was never called has no step to finish")
x = rng.standard_normal((7, 8))
layer.build(x.shape)
start = [x, *(keras.ops.convert_to_numpy(weight).copy() for weight in layer.trainable_weights)]
towards = [rng.standard_normal(value.shape) for value in start]

def take(distance):
    values = [value + distance * step for value, step in zip(start, towards, strict=True)]
    for weight, value in zip(layer.trainable_weights, values[1:], strict=True):
        weight.assign(value)
    return values[0]

def loss(distance):
    output = keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(take(distance)), training=True))
    assert output.dtype == np.float64
    return (output**2).sum()

if keras.config.backend() == "torch":
    import torch

    ours = torch.from_numpy(take(0.0)).requires_grad_()
    layer(ours, training=True).square().sum().backward()
    found = [ours.grad.numpy(), *(weight.value.grad.numpy() for weight in layer.trainable_weights)]
else:
    import tensorflow as tf

    ours = tf.Variable(take(0.0))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.square(layer(ours, training=True)))
    found = [each.numpy() for each in tape.gradient(total, [ours, *(w.value for w in layer.trainable_weights)])]
slope = sum((gradient * step).sum() for gradient, step in zip(found, towards, strict=True))
measured = (loss(1e-6) - loss(-1e-6)) / 2e-6
np.testing.assert_allclose(slope, measured, rtol=1e-6)
print("same slope")
"""

# What crosses between TensorFlow and torch one way or another.
CROSSES = """
import keras, numpy as np, tensorflow as tf, torch
from crossdock.integrations import keras as layers

# TensorFlow ends the process at the first operation on memory that begins where it should not.
unaligned = layers._to_tensorflow(torch.arange(9.0)[1:])
assert float(tf.reduce_sum(unaligned * unaligned)) == 204

# The backward pass computes with the noise of the forward pass, and counts each token once.
keras.utils.set_random_seed(1)
layer = layers.MoELayer(4, 1, 8, router={"input_jitter": 0.5, "norm_topk_prob": False})
x = tf.random.normal((64, 16), seed=1)
with tf.GradientTape() as tape:
    tape.watch(x)
    output = layer(x, training=True)
    total = tf.reduce_sum(output * tf.constant(np.random.default_rng(0).standard_normal((64, 16)), tf.float32))
gradient = tape.gradient(total, x)
assert layer.module.load.tokens_per_expert.sum() == 64
torch.manual_seed(3)
runs = [layer(x, training=True).numpy() for _ in range(2)]
assert (runs[0] != runs[1]).any()
def seeded():
    torch.manual_seed(3)
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x, training=True)
        torch.manual_seed(4)  # what else happens before the backward pass
        return tape.gradient(output, x).numpy()
own = torch.from_numpy(x.numpy().copy()).requires_grad_()
torch.manual_seed(3)
values = [torch.from_numpy(keras.ops.convert_to_numpy(weight).copy()) for weight in layer.trainable_weights]
layer._compute(own, values, True).sum().backward()
np.testing.assert_allclose(seeded(), own.grad.numpy(), rtol=1e-4, atol=1e-6)

# In a graph, with a number of tokens that is not known beforehand, none included; and in bfloat16.
graph = tf.function(lambda x: layer(x, training=False), input_signature=[tf.TensorSpec((None, 16))])
np.testing.assert_allclose(graph(x[:5]), layer(x[:5]), rtol=1e-5, atol=1e-6)
assert graph(x[:0]).shape == (0, 16)
narrow = layers.MoELayer(4, 2, 8, config={"expert_bias": True}, dtype="mixed_bfloat16")
assert narrow(x).dtype == tf.bfloat16
assert narrow._expert_bias.dtype == "float32"

# The same seed, the same weights.
for attempt in range(2):
    keras.utils.set_random_seed(7)
    made = layers.MoELayer(4, 2, 8)
    made.build((None, 16))
    drawn = keras.ops.convert_to_numpy(made.weights[1])
    assert attempt == 0 or (drawn == before).all()
    before = drawn
print("crosses")
"""

FITS = """
import keras, numpy as np
from crossdock.integrations.keras import MoELayer

keras.utils.set_random_seed(0)
moe = MoELayer(4, 2, 32, config={"expert_bias": True}, router={"score_function": "sigmoid"})
model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), moe, keras.layers.Dense(1)])
model.compile("adam", "mse")
x = np.random.default_rng(0).standard_normal((512, 16)).astype("float32")
y = np.sin(x[:, :1] + x[:, 1:2])
finish = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: moe.finish_step())
losses = model.fit(x, y, epochs=12, verbose=0, callbacks=[finish]).history["loss"]
assert losses[-1] < 0.6 * losses[0], losses
assert np.abs(keras.ops.convert_to_numpy(moe._expert_bias)).max() > 0
model.save("model.keras")
again = keras.models.load_model("model.keras")
np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
print("learns")
"""


def run(program: str, backend: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "KERAS_HOME": str(folder)}
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for busy cores make small operations far slower
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@needs_keras
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_those_of_the_torch_layer(backend: str, tmp_path: Path) -> None:
    done = run(EQUALS_TORCH, backend, tmp_path)
    assert done.stdout == "same\n", done.stderr


@needs_keras
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_learns_and_is_saved_with_its_expert_bias(backend: str, tmp_path: Path) -> None:
    done = run(FITS, backend, tmp_path)
    assert done.stdout == "learns\n", done.stderr


@needs_keras
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_slopes_in_float64(backend: str, tmp_path: Path) -> None:
    done = run(SLOPES, backend, tmp_path)
    assert done.stdout == "same slope\n", done.stderr


@needs_keras
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_crosses_to_tensorflow_is_whole(backend: str, tmp_path: Path) -> None:
    done = run(CROSSES, backend, tmp_path)
    assert done.stdout == "crosses\n", done.stderr


@needs_keras
def test_another_backend_is_refused_with_a_sentence(tmp_path: Path) -> None:
    # Keras's other backends need packages of their own; what they would answer will do.
    program = """
import keras
from crossdock.integrations.keras import MoELayer
keras.config.backend = lambda: "jax"
MoELayer(4, 2, 8)
"""
    done = run(program, "torch", tmp_path)
    assert "runs on the backends torch and tensorflow, not on jax" in done.stderr
