"""Keras' layers with a block mask Γ on the kernel: convolutions, Dense, EinsumDense."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import stateless_scope  # Keras exports the scope, not whether one is open

from bstf import layouts
from bstf.blocks import BlockShape, expand, grid

GAMMA = "gamma"  # key of Γ among a layer's stored variables


class MaskedKernel:
    """Adds Γ to a Keras layer of `bstf.layouts.LAYOUTS`, which knows how each of them stores and uses its kernel.

    The forward pass multiplies the kernel by the expanded Γ, so the loss has no gradient under a zero. A
    stored weight there could still be moved (momentum, decay) or be set by hand: a constraint on the
    kernel's variable, which every Keras optimizer applies after its update, zeroes it. The kernel's
    regulariser sees kept blocks only, so it feeds no slot of the optimizer under a zero either.
    """

    def __init__(self, *args: Any, block: "int | Sequence[int]" = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block = BlockShape.of(block)
        reason = layouts.refusal(self)
        if reason is not None:
            plain = type(self).__name__.removeprefix("Masked")
            raise ValueError(
                f"Layer '{self.name}' can't have a Γ, which needs every input channel to meet every output channel: "
                f"{reason}. Keep it as keras.layers.{plain}."
            )

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates Γ (all ones), then the layer's own weights."""
        # Γ first: a layer with LoRA in its config locks its state at the end of its own build.
        self._plane = layouts.channels(self, input_shape)
        self.gamma = self.add_weight(
            name=GAMMA,
            shape=grid(*self._plane, self.block),
            initializer="ones",
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",
        )
        super().build(input_shape)
        kernel = layouts.variable(self)
        self._own_constraint, self._own_regularizer = kernel.constraint, kernel.regularizer
        kernel.constraint = self._constrain
        if kernel.regularizer is not None:
            kernel.regularizer = self._regularize

    def call(self, inputs: Any) -> Any:
        """Computes as the Keras layer does, with the masked kernel."""
        outputs = layouts.layout(self).product(self, inputs, self.masked_kernel())
        if self.bias is not None:
            first = getattr(self, "data_format", None) == "channels_first"
            bias = ops.reshape(self.bias, (-1,) + (1,) * (len(outputs.shape) - 2)) if first else self.bias
            outputs = ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)

    def _mask(self, kernel: Any) -> Any:
        kept = layouts.from_planes(self, expand(self.gamma, self._plane, self.block, ops), ops) != 0
        kernel = ops.convert_to_tensor(kernel)
        # Chosen, not multiplied: 0 * NaN would stay NaN where an optimizer divides by the empty slots of a dead block.
        return ops.where(kept, kernel, ops.zeros((), kernel.dtype))

    def _constrain(self, kernel: Any) -> Any:
        kernel = kernel if self._own_constraint is None else self._own_constraint(kernel)
        return self._mask(kernel) if self._knows_gamma() else kernel

    def _knows_gamma(self) -> bool:
        """Whether Γ can be read here.

        In a compiled training step on JAX the optimizer is given the trainable variables alone, and Γ would be frozen
        at what it is when the step is traced. Zero gradients and slots keep dead weights zero there with SGD, Adam,
        AdamW, Lion, RMSprop and their like; with others `bstf.callbacks.BlockSparsity` clears them after each epoch.
        """
        if not stateless_scope.in_stateless_scope():
            return True
        return stateless_scope.get_stateless_scope().get_current_value(self.gamma) is not None

    def _regularize(self, kernel: Any) -> Any:
        return self._own_regularizer(self._mask(kernel))

    def masked_kernel(self) -> Any:
        """The kernel that the layer computes with, in Keras' order of axes, exactly zero under a zero of Γ."""
        return self._mask(getattr(self, layouts.layout(self).kernel))

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
        kernel = layouts.variable(self)
        for variable in [kernel, *_slots(optimizer, kernel)]:
            variable.assign(self._mask(variable))

    def save_own_variables(self, store: Any) -> None:
        """Writes the layer's variables and Γ; the LoRA that Keras merges into the kernel here is masked."""
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        own = {key: value for key, value in own.items() if value is not self.gamma}  # some layers write all they have
        if own:
            kernel = layouts.variable(self)
            key = next((key for key, value in own.items() if value is kernel), "0")
            own[key] = self._mask(ops.convert_to_tensor(own[key]))
            own[GAMMA] = self.gamma
        for key, value in own.items():
            store[key] = value

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote; Γ stays as it is where a plain layer wrote it."""
        own = {key: store[key] for key in store.keys()}  # noqa: SIM118 - an entry of a file is no mapping
        gamma = own.pop(GAMMA, None)
        # Keras counts the keys of the store, Γ's included, and then reads its own by number.
        own[str(len(own))] = ops.convert_to_numpy(self.gamma) if gamma is None else gamma
        super().load_own_variables(own)
        if gamma is not None:
            self.gamma.assign(gamma)
        kernel = layouts.variable(self)
        kernel.assign(self._mask(kernel))

    def get_config(self) -> dict[str, Any]:
        """The layer's config and its block."""
        return {**super().get_config(), "block": list(self.block)}


@keras.saving.register_keras_serializable("bstf")
class MaskedConv1D(MaskedKernel, keras.layers.Conv1D):
    """A `keras.layers.Conv1D` that computes with a block-sparse kernel (width, cin, cout).

    Args:
        *args: as `keras.layers.Conv1D`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.Conv1D`; `groups` must be 1.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `groups` isn't 1, or `block` isn't a block.

    Example:
        >>> layer = MaskedConv1D(16, 3, padding="causal", block=8)
        >>> layer.build((None, 100, 16))
        >>> layer.set_gamma(np.eye(2))
    """


@keras.saving.register_keras_serializable("bstf")
class MaskedConv2D(MaskedKernel, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that computes with a block-sparse kernel (height, width, cin, cout).

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


@keras.saving.register_keras_serializable("bstf")
class MaskedConv3D(MaskedKernel, keras.layers.Conv3D):
    """A `keras.layers.Conv3D` that computes with a block-sparse kernel (depth, height, width, cin, cout).

    Args:
        *args: as `keras.layers.Conv3D`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.Conv3D`; `groups` must be 1.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `groups` isn't 1, or `block` isn't a block.

    Example:
        >>> layer = MaskedConv3D(16, 3, block=8)
        >>> layer.build((None, 9, 28, 28, 16))
        >>> layer.set_gamma(np.eye(2))
    """


@keras.saving.register_keras_serializable("bstf")
class MaskedConv2DTranspose(MaskedKernel, keras.layers.Conv2DTranspose):
    """A `keras.layers.Conv2DTranspose` that computes with a block-sparse kernel.

    Keras stores its kernel as (height, width, cout, cin). Γ is (input blocks, output blocks) all the same.

    Args:
        *args: as `keras.layers.Conv2DTranspose`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.Conv2DTranspose`.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `block` isn't a block.

    Example:
        >>> layer = MaskedConv2DTranspose(24, 3, strides=2, block=8)
        >>> layer.build((None, 14, 14, 16))
        >>> layer.gamma.shape
        (2, 3)
    """


@keras.saving.register_keras_serializable("bstf")
class MaskedSeparableConv2D(MaskedKernel, keras.layers.SeparableConv2D):
    """A `keras.layers.SeparableConv2D` whose pointwise kernel is block sparse.

    The depthwise kernel, in which no input meets another one's output, stays dense. cin is that of the pointwise
    kernel: input channels x `depth_multiplier`.

    Args:
        *args: as `keras.layers.SeparableConv2D`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.SeparableConv2D`.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `block` isn't a block.

    Example:
        >>> layer = MaskedSeparableConv2D(24, 3, block=8)
        >>> layer.build((None, 28, 28, 16))
        >>> layer.gamma.shape
        (2, 3)
    """


@keras.saving.register_keras_serializable("bstf")
class MaskedDense(MaskedKernel, keras.layers.Dense):
    """A `keras.layers.Dense` that computes with a block-sparse kernel (cin, cout).

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


@keras.saving.register_keras_serializable("bstf")
class MaskedEinsumDense(MaskedKernel, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` that computes with a block-sparse kernel.

    The equation must be a product of one matrix: each axis of the kernel is either of the inputs alone, and summed
    over, or of the outputs alone; and each axis of the inputs is either the kernel's or the outputs'. The first kind
    together, in the kernel's order, are cin, the second cout: `abc,cde->abde` has cin = c and cout = d * e. With
    heads x channels of a head, blocks whose size divides the channels of a head don't cross heads.

    Args:
        *args: as `keras.layers.EinsumDense`.
        block: an int, or (input channels, output channels) of a block.
        **kwargs: as `keras.layers.EinsumDense`.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        block: BlockShape.

    Raises:
        ValueError: `equation` isn't such a product, or `block` isn't a block.

    Example:
        >>> layer = MaskedEinsumDense("abc,cde->abde", (None, 4, 8), block=8)
        >>> layer.build((None, 10, 16))
        >>> layer.gamma.shape
        (2, 4)
    """


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
