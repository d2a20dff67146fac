"""Keras' layers with a block mask Γ on the kernel: convolutions, Dense, EinsumDense."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import stateless_scope  # Keras exports the scope, not whether one is open

from bstf import layouts
from bstf.blocks import BlockShape, expand, grid
from bstf.penalties import group_lasso as lasso_penalty
from bstf.selection import check_ratio, kept_blocks

GAMMA = "gamma"  # key of Γ among a layer's stored variables
SOFT_GAMMA = "soft_gamma"  # key of the trainable Γ
STRAIGHT_THROUGH = "straight_through"
# What a masked layer's config has beyond the plain layer's.
ARGUMENTS = ("block", "trainable_gamma", "gamma_ratio", "gamma_regularizer", "group_lasso")


class MaskedKernel:
    """Adds Γ to a Keras layer of `bstf.layouts.LAYOUTS`, which knows how each of them stores and uses its kernel.

    The forward pass multiplies the kernel by the expanded Γ, so the loss has no gradient under a zero. A
    stored weight there could still be moved (momentum, decay) or be set by hand: a constraint on the
    kernel's variable, which every Keras optimizer applies after its update, zeroes it. The kernel's
    regulariser sees kept blocks only, so it feeds no slot of the optimizer under a zero either.

    With `trainable_gamma` (the paper's section III-D) the layer has one more float for each block, `soft_gamma`,
    which trains with the kernel. With True it is the paper's Γ before rounding, which starts at 1: the kernel of a
    block is multiplied by it. With "straight_through" (Bengio et al. 2013, arXiv 1308.3432; Ramanujan et al. 2020,
    arXiv 1911.13299) it is a score: the forward pass keeps the blocks with the largest, all but the fraction
    `gamma_ratio` of them, and the gradient passes to all scores as if they were multiplied. Γ itself still says
    which blocks are dead for good: those stay zero in all of this. `bstf.sparsify(model, ratio,
    importance="gamma")` rounds to a layer without it.
    """

    def __init__(
        self,
        *args: Any,
        block: "int | Sequence[int]" = 8,
        trainable_gamma: bool | str = False,
        gamma_ratio: float = 0.0,
        gamma_regularizer: Any = None,
        group_lasso: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.block = BlockShape.of(block)
        reason = layouts.refusal(self)
        if reason is not None:
            plain = type(self).__name__.removeprefix("Masked")
            raise ValueError(
                f"Layer '{self.name}' can't have a Γ, which needs every input channel to meet every output channel: "
                f"{reason}. Keep it as keras.layers.{plain}."
            )
        self.trainable_gamma = check_trainable_gamma(trainable_gamma, gamma_regularizer)
        self.gamma_ratio = check_ratio(gamma_ratio)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.group_lasso = check_group_lasso(group_lasso)

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
        if self.trainable_gamma:
            self.soft_gamma = self.add_weight(
                name=SOFT_GAMMA,
                shape=self.gamma.shape,
                initializer="ones",
                dtype="float32",
                autocast=False,
                constraint=self._alive,
                regularizer=None if self.gamma_regularizer is None else self._regularize_gamma,
            )
        super().build(input_shape)
        kernel = layouts.variable(self)
        self._own_constraint, self._own_regularizer = kernel.constraint, kernel.regularizer
        kernel.constraint = self._constrain
        if kernel.regularizer is not None or self.group_lasso:
            kernel.regularizer = self._regularize

    def call(self, inputs: Any) -> Any:
        """Computes as the Keras layer does, with the masked kernel."""
        outputs = layouts.layout(self).product(self, inputs, self.masked_kernel())
        if self.bias is not None:
            first = getattr(self, "data_format", None) == "channels_first"
            bias = ops.reshape(self.bias, (-1,) + (1,) * (len(outputs.shape) - 2)) if first else self.bias
            outputs = ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)

    def _expand(self, gamma: Any) -> Any:
        """A value for each block as a value for each weight, in Keras' order of the kernel's axes."""
        return layouts.from_planes(self, expand(gamma, self._plane, self.block, ops), ops)

    def _mask(self, kernel: Any) -> Any:
        kept = self._expand(ops.cast(self.gamma, "bool"))
        # Chosen, not multiplied: 0 * NaN would stay NaN where an optimizer divides by the empty slots of a dead block.
        return ops.where(kept, ops.convert_to_tensor(kernel), 0)

    def _alive(self, soft_gamma: Any) -> Any:
        soft_gamma = ops.convert_to_tensor(soft_gamma)
        if not self._knows_gamma():
            return soft_gamma
        return ops.where(self.gamma != 0, soft_gamma, ops.zeros((), soft_gamma.dtype))

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
        kept = self._mask(kernel)
        penalty = 0.0 if self._own_regularizer is None else self._own_regularizer(kept)
        if not self.group_lasso:
            return penalty
        return penalty + lasso_penalty(layouts.to_planes(self, kept, ops), self.block, self.group_lasso)

    def _regularize_gamma(self, soft_gamma: Any) -> Any:
        return self.gamma_regularizer(self._alive(soft_gamma))

    def masked_kernel(self) -> Any:
        """The kernel that the layer computes with, in Keras' order of axes, exactly zero under a zero of Γ."""
        kernel = getattr(self, layouts.layout(self).kernel)
        if self.trainable_gamma:
            gamma = ops.convert_to_tensor(self.soft_gamma)
            if self.trainable_gamma == STRAIGHT_THROUGH:
                gamma = _straight_through(gamma, self.gamma, self.gamma_ratio)
            kernel = kernel * ops.cast(self._expand(gamma), kernel.dtype)
        return self._mask(kernel)

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
        if self.trainable_gamma:
            for variable in [self.soft_gamma, *_slots(optimizer, self.soft_gamma)]:
                variable.assign(self._alive(variable))

    def save_own_variables(self, store: Any) -> None:
        """Writes what a plain layer writes, and Γ; the LoRA that Keras merges into the kernel here is masked."""
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        plain = [value for value in own.values() if not self._is_gamma(value)]  # some layers write all they have
        if not plain:
            return
        kernel = layouts.variable(self)
        index = next((i for i, value in enumerate(plain) if value is kernel), 0)
        plain[index] = self._mask(ops.convert_to_tensor(plain[index]))
        for i, value in enumerate(plain):
            store[str(i)] = value
        store[GAMMA] = self.gamma
        if self.trainable_gamma:
            store[SOFT_GAMMA] = self.soft_gamma

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote; Γ stays as it is where a plain layer wrote it."""
        given = {key: store[key] for key in store.keys()}  # noqa: SIM118 - an entry of a file is no mapping
        gamma, soft_gamma = given.pop(GAMMA, self.gamma), given.pop(SOFT_GAMMA, None)
        super().load_own_variables(self._with_gammas(given))
        self.gamma.assign(gamma)
        kernel = layouts.variable(self)
        kernel.assign(self._mask(kernel))
        if self.trainable_gamma:
            self.soft_gamma.assign(self._alive(self.soft_gamma if soft_gamma is None else soft_gamma))

    def _with_gammas(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a plain layer wrote, as Keras' own method reads it here: it counts the variables, Γ's among them."""
        expected: dict[str, Any] = {}
        super().save_own_variables(expected)
        gammas = {key: ops.convert_to_numpy(value) for key, value in expected.items() if self._is_gamma(value)}
        if not gammas:  # it reads the plain layer's variables, and only counts the others
            return given | {f"{GAMMA} {i}": None for i in range(1 + bool(self.trainable_gamma))}
        numbers = iter([key for key in expected if key not in gammas])
        plain = sorted(given, key=lambda key: (len(key), key))
        return gammas | {next(numbers, f"{key}, one too many"): given[key] for key in plain}

    def _is_gamma(self, value: Any) -> bool:
        return value is self.gamma or (bool(self.trainable_gamma) and value is self.soft_gamma)

    def get_config(self) -> dict[str, Any]:
        """The layer's config, its block and how Γ is trained."""
        return {
            **super().get_config(),
            "block": list(self.block),
            "trainable_gamma": self.trainable_gamma,
            "gamma_ratio": self.gamma_ratio,
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "group_lasso": self.group_lasso,
        }


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
        trainable_gamma: False; True to train a Γ that the kernel is multiplied by; or "straight_through" to train
            scores of which the forward pass keeps the largest. See `bstf.sparsify`.
        gamma_ratio: for "straight_through", the fraction of blocks that are zero in the forward pass, in [0, 1).
        gamma_regularizer: Keras regulariser of the trained Γ or scores, such as those of `bstf.penalties`.
        group_lasso: strength of a `bstf.penalties.GroupLasso` on the kernel, beside its `kernel_regularizer`.
        **kwargs: as `keras.layers.Conv2D`; `groups` must be 1.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        soft_gamma: what is trained of Γ, float32 of the same shape; only with `trainable_gamma`.
        block: BlockShape.

    Raises:
        ValueError: `groups` isn't 1, `block` isn't a block, or another argument is out of range.

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
        trainable_gamma: False; True to train a Γ that the kernel is multiplied by; or "straight_through" to train
            scores of which the forward pass keeps the largest. See `bstf.sparsify`.
        gamma_ratio: for "straight_through", the fraction of blocks that are zero in the forward pass, in [0, 1).
        gamma_regularizer: Keras regulariser of the trained Γ or scores, such as those of `bstf.penalties`.
        group_lasso: strength of a `bstf.penalties.GroupLasso` on the kernel, beside its `kernel_regularizer`.
        **kwargs: as `keras.layers.Dense`.

    Attributes:
        gamma: Γ, a non-trainable float32 variable of 0 and 1, (ceil(cin / bi), ceil(cout / bo)).
        soft_gamma: what is trained of Γ, float32 of the same shape; only with `trainable_gamma`.
        block: BlockShape.

    Raises:
        ValueError: `block` isn't a block, or another argument is out of range.

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


def check_trainable_gamma(trainable_gamma: bool | str, gamma_regularizer: Any = None) -> bool | str:
    """Returns how Γ is trained, or raises a ValueError: unknown, or a regulariser of a Γ that isn't trained."""
    if trainable_gamma not in (False, True, STRAIGHT_THROUGH):
        raise ValueError(f"trainable_gamma must be False, True or '{STRAIGHT_THROUGH}'; got {trainable_gamma!r}.")
    if gamma_regularizer is not None and not trainable_gamma:
        raise ValueError("gamma_regularizer acts on a trained Γ: give trainable_gamma=True as well.")
    return trainable_gamma


def check_group_lasso(strength: float) -> float:
    """Returns the strength of the group lasso, or raises a ValueError unless it is a finite number of at least 0."""
    if not isinstance(strength, numbers.Real) or isinstance(strength, bool) or not 0 <= strength < math.inf:
        raise ValueError(f"group_lasso is the strength of a penalty, a number of at least 0; got {strength!r}.")
    return float(strength)


def _straight_through(scores: Any, alive: Any, ratio: float) -> Any:
    """0/1: the blocks of the largest scores, all but the fraction `ratio`; its gradient is that of the scores."""
    flat = ops.reshape(ops.where(alive != 0, scores, ops.full((), -math.inf, scores.dtype)), (-1,))
    count = kept_blocks(*scores.shape, ratio, min_per_line=0)
    if count == 0:
        kept = ops.zeros_like(flat)
    else:
        _, best = ops.top_k(ops.stop_gradient(flat), count)  # of equal scores the first, as `select` does
        kept = ops.scatter(ops.expand_dims(best, -1), ops.ones((count,), scores.dtype), flat.shape)
    kept = ops.reshape(kept, scores.shape)
    return ops.stop_gradient(kept) + (scores - ops.stop_gradient(scores))  # the difference is exactly 0


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
