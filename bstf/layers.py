"""MaskedConv2D and MaskedDense: Keras' layers with a block mask Γ on the kernel."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope  # no public names

from bstf.blocks import BlockShape, expand, grid

GAMMA = "gamma"  # key of Γ among a layer's stored variables


class MaskedKernel:
    """Adds Γ to a Keras layer whose kernel is (..., cin, cout).

    The forward pass multiplies the kernel by the expanded Γ, so the loss has no gradient under a zero. A
    stored weight there could still be moved (momentum, decay) or be set by hand: a constraint on the
    kernel's variable, which every Keras optimizer applies after its update, zeroes it. The kernel's
    regulariser sees kept blocks only, so it feeds no slot of the optimizer under a zero either.
    """

    def __init__(self, *args: Any, block: "int | Sequence[int]" = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block = BlockShape.of(block)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates Γ (all ones), then the layer's own weights."""
        # Γ first: a layer with LoRA in its config locks its state at the end of its own build.
        self.gamma = self.add_weight(
            name=GAMMA,
            shape=grid(*self._channels(input_shape), self.block),
            initializer="ones",
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",
        )
        super().build(input_shape)
        self._kernel.constraint = self._constrain
        if self._kernel.regularizer is not None:
            self._kernel.regularizer = self._regularize

    def _mask(self, kernel: Any) -> Any:
        # Chosen, not multiplied: 0 * NaN would stay NaN where an optimizer divides by the empty slots of a dead block.
        kernel = ops.convert_to_tensor(kernel)  # JAX takes no variables in eager operations
        kept = expand(self.gamma, kernel.shape, self.block, ops) != 0
        return ops.where(kept, kernel, ops.zeros((), kernel.dtype))

    def _constrain(self, kernel: Any) -> Any:
        kernel = kernel if self.kernel_constraint is None else self.kernel_constraint(kernel)
        return self._mask(kernel) if _known_here(self.gamma) else kernel

    def _regularize(self, kernel: Any) -> Any:
        return self.kernel_regularizer(self._mask(kernel))

    def masked_kernel(self) -> Any:
        """The kernel that the layer computes with: (..., cin, cout), exactly zero under a zero of Γ."""
        return self._mask(self.kernel)

    def set_gamma(self, gamma: np.ndarray, optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Sets Γ, and zeroes what a zero of it covers: the stored kernel and the optimizer's slots of it.

        Args:
            gamma: 0 or 1 an entry, (rows, cols).
            optimizer: the optimizer that trains this layer, if it has already taken a step. Momenta, moving
                averages and accumulated gradients left in a dead block would otherwise stay there.

        Raises:
            ValueError: the layer isn't built, or `gamma` has another shape or other values.

        Example:
            >>> layer.set_gamma(np.eye(2), model.optimizer)
        """
        if not self.built:
            raise ValueError(f"Layer '{self.name}' has no Γ yet: build it (call it on data) before set_gamma.")
        gamma = np.asarray(gamma)
        shape = tuple(self.gamma.shape)
        if gamma.shape != shape:
            raise ValueError(f"Γ of layer '{self.name}' ({self.block} blocks) is {shape}; got {gamma.shape}.")
        if not np.isin(gamma, (0, 1)).all():
            raise ValueError(f"Γ of layer '{self.name}' is made of 0 and 1 only; got other values.")
        self.gamma.assign(gamma.astype("float32"))
        for variable in [self._kernel, *_slots(optimizer, self._kernel)]:
            variable.assign(self._mask(variable))

    def save_own_variables(self, store: Any) -> None:
        """Writes the layer's variables and Γ; the LoRA that Keras merges into the kernel here is masked."""
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        if own:
            own["0"] = self._mask(ops.convert_to_tensor(own["0"]))
            own[GAMMA] = self.gamma
        for key, value in own.items():
            store[key] = value

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote."""
        # Keras counts the keys of the store, Γ's included, and then reads its own by name.
        super().load_own_variables(store)
        self.gamma.assign(store[GAMMA])
        self._kernel.assign(self._mask(self._kernel))

    def get_config(self) -> dict[str, Any]:
        """The layer's config and its block."""
        return {**super().get_config(), "block": list(self.block)}


@keras.saving.register_keras_serializable("bstf")
class MaskedConv2D(MaskedKernel, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that computes with a block-sparse kernel.

    Args:
        *args: as `keras.layers.Conv2D`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.Conv2D`; `groups` must be 1.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `groups` isn't 1, or `block` isn't a block.

    Example:
        >>> layer = MaskedConv2D(16, 3, block=8)
        >>> layer.build((None, 28, 28, 16))
        >>> layer.set_gamma(np.eye(2))
    """

    def __init__(self, *args: Any, block: "int | Sequence[int]" = 8, **kwargs: Any):
        super().__init__(*args, block=block, **kwargs)
        if self.groups != 1:
            raise ValueError(
                f"Layer '{self.name}' has groups={self.groups}, but Γ needs every input to meet every "
                "output channel: keep a grouped convolution as keras.layers.Conv2D."
            )

    def _channels(self, input_shape: Sequence[int | None]) -> tuple[int, int]:
        axis = -1 if self.data_format == "channels_last" else 1
        return _known(self, input_shape[axis]), self.filters

    def call(self, inputs: Any) -> Any:
        """Convolves (batch, height, width, cin) with the masked kernel."""
        outputs = self.convolution_op(inputs, self.masked_kernel())
        if self.use_bias:
            channels_last = self.data_format == "channels_last"
            outputs = outputs + ops.reshape(self.bias, (1, 1, 1, -1) if channels_last else (1, -1, 1, 1))
        return outputs if self.activation is None else self.activation(outputs)


@keras.saving.register_keras_serializable("bstf")
class MaskedDense(MaskedKernel, keras.layers.Dense):
    """A `keras.layers.Dense` that computes with a block-sparse kernel.

    Args:
        *args: as `keras.layers.Dense`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.Dense`.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `block` isn't a block.

    Example:
        >>> layer = MaskedDense(10, block=(8, 4))
        >>> layer.build((None, 16))
        >>> layer.gamma.shape
        (2, 3)
    """

    def _channels(self, input_shape: Sequence[int | None]) -> tuple[int, int]:
        return _known(self, input_shape[-1]), self.units

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Multiplies (..., cin) by the masked kernel."""
        outputs = ops.matmul(inputs, self.masked_kernel())
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)


def _known(layer: keras.Layer, channels: int | None) -> int:
    if channels is None:
        raise ValueError(
            f"Layer '{layer.name}' is built for an unknown number of input channels: give its input a shape "
            "whose channel axis isn't None."
        )
    return channels


def _known_here(variable: keras.Variable) -> bool:
    """Whether a variable has its value here: Keras on JAX shows optimizers only what they train and remember.

    Γ would be a constant from another time there. Without gradients, and with the slots that `set_gamma`
    emptied, an optimizer leaves the zeros of a dead block alone.
    """
    return not in_stateless_scope() or get_stateless_scope().get_current_value(variable) is not None


def _slots(optimizer: keras.optimizers.Optimizer | None, variable: keras.Variable) -> list[keras.Variable]:
    """What an optimizer remembers element by element about a variable: momenta, averages, accumulators.

    Keras optimizers keep each kind of slot in a list, in the order of the variables they train. Names would
    not do: two layers in different nested models may have the same path.
    """
    if optimizer is None or not optimizer.built:
        return []
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # loss scaling wraps the one with the slots
    if hasattr(optimizer, "optimizers"):  # Keras' MultiOptimizer: each has variables of its own
        return [slot for one in optimizer.optimizers for slot in _slots(one, variable)]
    trained = optimizer._trainable_variables
    index = next((i for i, one in enumerate(trained) if one is variable), None)
    if index is None:
        return []
    lists = [v for v in vars(optimizer).values() if isinstance(v, list) and len(v) == len(trained)]
    slots = [one[index] for one in lists if isinstance(one[index], keras.Variable)]
    return [slot for slot in slots if slot is not variable and slot.shape == variable.shape]
