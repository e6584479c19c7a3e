"""The Keras layer computes what the torch layer computes, learns, and is saved; on both backends."""

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
            pytest.mark.slow,
            pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow-cpu"),
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
def test_another_backend_is_refused_with_a_sentence(tmp_path: Path) -> None:
    program = "from crossdock.integrations.keras import MoELayer\nMoELayer(4, 2, 8)"
    done = run(program, "numpy", tmp_path)
    assert "runs on the backends torch and tensorflow, not on numpy" in done.stderr
