"""The loss of a model as a function of its kernels: values, gradients, products with the Hessian.

Batch normalisation and dropout are in inference mode everywhere. Keras' regularisers aren't part of the loss:
what counts is what the model computes, and not how large its weights are.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from bstf import layouts
from bstf.batches import Batch

Loss = str | keras.losses.Loss | Callable[[Any, Any], Any] | None


class Objective:
    """The mean loss of a model over a batch, with other kernels in place of some of its own.

    Args:
        model: a built model; it stays as it is.
        layers: the layers whose kernels are the variables. With LoRA the kernel is the one it is added to, so
            that derivatives are those by the sum.
        loss: a Keras loss, its name, or a callable `(labels, outputs) -> loss` of which the mean is taken;
            None for the loss the model is compiled with.

    Attributes:
        kernels: the layers' own kernels as the layers store them, tensors of the backend.

    Raises:
        ValueError: there is no such loss, or none at all; a layer has a trainable Γ; or the backend derives nothing.

    Example:
        >>> objective = Objective(model, [model.get_layer("conv")], "mse")
        >>> loss, (gradient,) = objective.gradient(batch)
    """

    def __init__(self, model: keras.Model, layers: Sequence[keras.Layer], loss: Loss = None) -> None:
        self.model = model
        for layer in layers:
            if getattr(layer, "trainable_gamma", False):
                raise ValueError(
                    f"Layer '{layer.name}' has a trainable Γ, by which its kernel is multiplied: round it with "
                    "sparsify(model, ratio, importance='gamma') before the loss is derived by the kernel."
                )
        self._variables = [layouts.variable(layer) for layer in layers]
        self._loss = _loss_of(model, loss)
        self._value, self._gradient, self._square_gradients, self._hessian_product = _compiled(self._call)
        # By NumPy: under tf.distribute the variable itself would come back, a copy on each device.
        self.kernels = [ops.convert_to_tensor(ops.convert_to_numpy(variable)) for variable in self._variables]

    def value(self, batch: Batch, kernels: Sequence[Any] | None = None) -> tuple[float, Any]:
        """The loss with these kernels instead of the model's own, and the model's outputs."""
        return self._checked(self._value, batch, self.kernels if kernels is None else list(kernels))

    def gradient(self, batch: Batch) -> tuple[float, list[np.ndarray]]:
        """The loss, and its gradient by every kernel: arrays of the kernels' shapes."""
        loss, gradients = self._checked(self._gradient, batch, self.kernels)
        return loss, [ops.convert_to_numpy(gradient) for gradient in gradients]

    def square_gradients(self, batch: Batch) -> tuple[float, list[np.ndarray]]:
        """The sum of the examples' losses, and of the squares of their gradients by every kernel.

        Examples go through the model one at a time, on the device all of them: the gradient of several has cross terms.
        """
        loss, squares = self._checked(self._square_gradients, batch, self.kernels)
        return loss, [ops.convert_to_numpy(square) for square in squares]

    def hessian_product(self, batch: Batch, vectors: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        """The loss, and the product of its Hessian (over all kernels together) and a vector, kernel by kernel."""
        vectors = [ops.convert_to_tensor(vector, kernel.dtype) for vector, kernel in zip(vectors, self.kernels)]
        loss, products = self._checked(self._hessian_product, batch, self.kernels, vectors)
        return loss, [ops.convert_to_numpy(product) for product in products]

    def _call(self, kernels: Sequence[Any], x: Any, y: Any) -> tuple[Any, Any]:
        with keras.StatelessScope(state_mapping=list(zip(self._variables, kernels))):
            outputs = self.model(x, training=False)
            return ops.mean(self._loss(y, outputs)), outputs

    def _checked(self, function: Callable[..., tuple[Any, Any]], batch: Batch, *vectors: Any) -> tuple[float, Any]:
        try:
            if not getattr(self._loss, "built", True):  # a compiled loss that no fit has built yet
                self._loss.build(batch.y, self.model(batch.x, training=False))
            loss, result = function(*vectors, batch.x, batch.y)
            loss = float(loss)
        except Exception as error:  # of any layer, any loss, any backend
            raise ValueError(
                f"The loss of '{self.model.name}' can't be computed on {_shapes(batch.x)} with labels "
                f"{_shapes(batch.y)}, or not be derived: {_first_sentence(error)}"
            ) from error
        if not np.isfinite(loss):
            raise ValueError(
                f"The loss of '{self.model.name}' is {loss} on a batch: check its inputs and labels, and load a "
                "checkpoint from before the training diverged."
            )
        return loss, result


def _loss_of(model: keras.Model, loss: Loss) -> Callable[[Any, Any], Any]:
    if loss is None:
        if getattr(model, "_compile_loss", None) is None:
            raise ValueError(
                f"'{model.name}' isn't compiled with a loss: compile it, or say which one, for instance "
                "loss='sparse_categorical_crossentropy'."
            )
        return model._compile_loss
    try:
        found = keras.losses.get(loss)
    except ValueError as error:
        raise ValueError(
            f"Keras has no loss {loss!r}: give its name or a callable (labels, outputs) -> loss."
        ) from error
    return found


def _compiled(function: Callable[..., tuple[Any, Any]]) -> tuple[Callable, Callable, Callable, Callable]:
    """(value, gradient, squares, product with the Hessian) of a function `(kernels, x, y) -> (loss, outputs)`."""
    derivatives = {"tensorflow": _with_tensorflow, "jax": _with_jax, "torch": _with_torch}
    backend = keras.backend.backend()
    if backend not in derivatives:
        raise ValueError(f"Losses and their derivatives need Keras on {', '.join(derivatives)}; it runs on {backend}.")
    return derivatives[backend](function)


def _square_gradients(gradient: Callable[..., tuple[Any, list[Any]]]) -> Callable[..., tuple[Any, list[Any]]]:
    def summed(kernels: list[Any], x: Any, y: Any) -> tuple[Any, list[Any]]:
        def add(i: Any, sums: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
            one = keras.tree.map_structure(lambda tensor: ops.expand_dims(ops.take(tensor, i, axis=0), 0), (x, y))
            loss, gradients = gradient(kernels, *one)
            squares = [total + ops.square(ops.cast(g, total.dtype)) for total, g in zip(sums[1], gradients)]
            return sums[0] + ops.cast(loss, "float32"), squares

        examples = keras.tree.flatten(x)[0].shape[0]
        # Of half precision, small squares would be 0 and large ones infinite.
        zeros = [ops.zeros(k.shape, keras.backend.result_type(k.dtype, "float32")) for k in kernels]
        return ops.fori_loop(0, examples, add, (ops.zeros((), "float32"), zeros))

    return summed


def _with_tensorflow(function: Callable[..., tuple[Any, Any]]) -> tuple[Callable, Callable, Callable, Callable]:
    def gradient(kernels: list[tf.Tensor], x: Any, y: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kernels)
            loss, _ = function(kernels, x, y)
        return loss, tape.gradient(loss, kernels, unconnected_gradients="zero")

    def hessian_product(kernels: list[tf.Tensor], vectors: list[tf.Tensor], x: Any, y: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kernels)
            loss, gradients = gradient(kernels, x, y)
            along = tf.add_n([tf.reduce_sum(g * vector) for g, vector in zip(gradients, vectors)])
        return loss, tape.gradient(along, kernels, unconnected_gradients="zero")

    return tuple(_traced(one) for one in (function, gradient, _square_gradients(gradient), hessian_product))


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    traced = tf.function(function)
    # A plain call would warn of retracing as soon as a program looks at several models.
    return lambda *arguments: traced.get_concrete_function(*arguments)(*arguments)


def _with_jax(function: Callable[..., tuple[Any, Any]]) -> tuple[Callable, Callable, Callable, Callable]:
    import jax  # only where Keras runs on it

    def gradient(kernels: list[Any], x: Any, y: Any) -> tuple[Any, list[Any]]:
        (loss, _), gradients = jax.value_and_grad(function, has_aux=True)(kernels, x, y)
        return loss, gradients

    def hessian_product(kernels: list[Any], vectors: list[Any], x: Any, y: Any) -> tuple[Any, list[Any]]:
        (loss, _), (_, products) = jax.jvp(lambda at: gradient(at, x, y), (kernels,), (vectors,))
        return loss, products

    return tuple(jax.jit(one) for one in (function, gradient, _square_gradients(gradient), hessian_product))


def _with_torch(function: Callable[..., tuple[Any, Any]]) -> tuple[Callable, Callable, Callable, Callable]:
    import torch  # only where Keras runs on it

    def value(kernels: list[Any], x: Any, y: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return function(kernels, x, y)

    def derived(loss: Any, kernels: list[Any], again: bool = False) -> list[Any]:
        """The gradient; again: one that can be derived itself."""
        if not loss.requires_grad:  # it doesn't depend on the kernels
            return [torch.zeros_like(kernel) for kernel in kernels]
        return list(torch.autograd.grad(loss, kernels, create_graph=again, materialize_grads=True))

    def gradient(kernels: list[Any], x: Any, y: Any) -> tuple[Any, list[Any]]:
        kernels = [kernel.detach().requires_grad_() for kernel in kernels]
        loss, _ = function(kernels, x, y)
        return loss.detach(), derived(loss, kernels)

    def hessian_product(kernels: list[Any], vectors: list[Any], x: Any, y: Any) -> tuple[Any, list[Any]]:
        kernels = [kernel.detach().requires_grad_() for kernel in kernels]
        loss, _ = function(kernels, x, y)
        along = sum((g * vector).sum() for g, vector in zip(derived(loss, kernels, again=True), vectors))
        return loss.detach(), derived(along, kernels)

    return value, gradient, _square_gradients(gradient), hessian_product


def _shapes(arrays: Any) -> str:
    return ", ".join(str(tuple(array.shape)) for array in keras.tree.flatten(arrays))


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"\w+(Error|Exception): ", line)]
    if raised:  # the rest is where
        return raised[-1].partition(": ")[2]
    return next((line for line in lines if not line.startswith(("Exception encountered", "in user code"))), repr(error))
