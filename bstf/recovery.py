"""What a model that lost blocks can get back without labels or training: its layers' outputs and statistics.

`obs_update` gives every masked layer the kernel that keeps its output closest to the dense model's;
`reestimate_batch_norm` measures the means and variances anew; `recover` takes the one that fits.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf import layouts
from bstf.batches import Progress, image_batches
from bstf.lockstep import Call, Lockstep
from bstf.patches import patches
from bstf.places import effective_kernel, everywhere, is_graph, masked_places, replaced_calls

_PATCH_ELEMENTS = 2**24  # of float64 patches held at a time: 128 MiB


def recover(
    sparse: keras.Model,
    data: Any,
    dense: keras.Model | None = None,
    *,
    damping: float = 1e-2,
) -> None:
    """Brings back accuracy that a model lost with its blocks, from images alone; changes the model.

    With the dense model it is `obs_update`, otherwise `reestimate_batch_norm`. Not both: after the update the
    layers give what the dense model's statistics were made for, and the smaller variance of a least squares
    fit, scaled up again by new statistics, would be noise.

    Args:
        sparse: the model that `bstf.sparsify` made, float.
        data: calibration images as for `bstf.quantize`, some hundred of those it was trained with; they are held
            in memory.
        dense: the model it was made from.
        damping: of `obs_update`.

    Raises:
        ValueError: no images, of a wrong shape, not finite; or `dense` isn't the dense form of `sparse`.
        TypeError: `data` isn't a set of images.

    Example:
        >>> sparse = bstf.sparsify(model, ratio=0.5)
        >>> bstf.recover(sparse, images, dense=model)
    """
    if dense is None:
        reestimate_batch_norm(sparse, data)
    else:
        obs_update(sparse, data, dense, damping=damping)


def reestimate_batch_norm(model: keras.Model, data: Any) -> None:
    """Replaces the moving means and variances of all batch normalisations by those of a calibration set.

    One pass, in which every batch is normalised by its own statistics as in training. Each layer's mean and
    variance become those of all its inputs in that pass: exact, every element counts alike, whatever the layer's
    momentum. (The re-estimation of Izmailov et al. 2018, arXiv 1803.05407, section 3.2, with the batches'
    variances pooled by Chan et al. 1983.) Nothing else changes: no dropout, no weights.

    Args:
        model: Sequential or functional, with its weights.
        data: calibration images, as for `bstf.quantize`. Batches should be as large as in training.

    Raises:
        ValueError: no images, of a wrong shape or not finite. The model is unchanged then.
        TypeError: `data` isn't a set of images.

    Example:
        >>> reestimate_batch_norm(sparse, dataset.images(512))
    """
    layers = [layer for _, layer, _ in everywhere(model) if isinstance(layer, keras.layers.BatchNormalization)]
    if not layers:
        raise ValueError(f"'{model.name}' has no batch normalisation to re-estimate: give the dense model as well.")
    before = [tuple(map(ops.convert_to_numpy, (layer.moving_mean, layer.moving_variance))) for layer in layers]
    pooled = {id(layer): _Pooled() for layer in layers}

    def measured(layer: keras.Layer, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        axes = [axis for axis in range(len(x.shape)) if axis != layer.axis % len(x.shape)]
        mean, variance = ops.moments(ops.cast(x, "float32"), axes)
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)
        count = int(np.prod([x.shape[axis] for axis in axes]))
        pooled[id(layer)].add(count, ops.convert_to_numpy(mean), ops.convert_to_numpy(variance))
        return call(x, *args, **{**kwargs, "training": False})

    complete = False
    try:
        with replaced_calls(layers, measured):
            for batch in _held(model, data):
                model(batch, training=False)
        complete = True
    finally:
        for layer, old in zip(layers, before):
            one = pooled[id(layer)]
            mean, variance = (one.mean, one.variance) if complete and one.count else old
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(variance)


def obs_update(sparse: keras.Model, data: Any, dense: keras.Model, *, damping: float = 1e-2) -> None:
    """Gives every masked layer the kernel that keeps its output closest to the dense model's; changes `sparse`.

    For Γ as it is, the kernel W minimises sum |X W - Y|^2 + λ |W - W_0|^2 over the calibration images. X are
    the layer's inputs in the sparse model, im2col patches of a convolution, Y its outputs in the dense model
    before bias and activation, W_0 the present kernel. Per output channel this is a linear system over the
    kept inputs, in float64. It is the weight update of the Optimal Brain Surgeon (Hassibi & Stork 1993) for all
    dead blocks of a layer at once: with X the dense inputs and λ -> 0, W is W_dense - H^-1 E (E' H^-1 E)^-1 E'
    W_dense, where H = X' X and E picks the dead weights. Layers are taken in order, so that each makes good for
    what those before it could not. Sequential and functional models run over the images once, layer by layer (and
    once more for a layer that is called several times). Biases stay, labels aren't used.

    Args:
        sparse: a model with masked layers, float.
        data: calibration images, as for `bstf.quantize`; held in memory with what the present layer and those on
            other branches make of them, in both models: some 4 GB for ResNet50 and 256 images of 224x224.
        dense: a model with layers of the same names and kernel shapes: what `sparse` was made from.
        damping: λ as a fraction of the mean diagonal of X' X, above 0. It decides where images are too few.

    Raises:
        ValueError: no images, of a wrong shape, not finite; `dense` lacks a layer; `damping` isn't above 0.
        TypeError: `data` isn't a set of images.

    Example:
        >>> obs_update(sparse, dataset.images(512), model)
    """
    if not damping > 0:
        raise ValueError(f"damping must be above 0; got {damping!r}.")
    pairs = {layer: (name, original) for name, layer, original in _pairs(sparse, dense)}
    batches = _held(sparse, data)
    ours, theirs = Lockstep(sparse, batches), Lockstep(dense, batches)
    layers = ours.order(pairs)
    progress = Progress(len(layers) * len(batches), unit="batch")
    for layer in layers:
        name, original = pairs[layer]
        call, original_call = ours.around(layer), theirs.around(original)
        equations, times = _NormalEquations(layer), None
        for batch in range(len(batches)):
            inputs = _inputs_of(layer, call, batch, times)
            targets = [_linear(original, x) for x in _inputs_of(original, original_call, batch, times)]
            times = len(inputs)
            for x, y in zip(inputs, targets):
                equations.add(x, y)
            progress.step()
        kernel = equations.solve(effective_kernel(layer), ops.convert_to_numpy(layer.gamma), damping)
        if not np.isfinite(kernel).all():
            raise ValueError(f"Layer '{name}' computes NaN or infinite values on the calibration images.")
        variable = layouts.variable(layer)
        stored = layouts.from_planes(layer, kernel)
        variable.assign(layer._mask(ops.convert_to_tensor(stored, variable.dtype)))
    progress.finish()


class _Pooled:
    """Mean and variance of all elements of several batches, in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, np.float64(0), np.float64(0)

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        total = self.count + count
        share = count / total
        shift = mean.astype(np.float64) - self.mean
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * shift**2
        self.mean = self.mean + share * shift
        self.count = total


class _NormalEquations:
    """X' X and X' Y of a layer, summed over batches: float64 (inputs, inputs) and (inputs, cout).

    Inputs are all that a kernel (..., cin, cout) multiplies, in its order.
    """

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer
        self.gram, self.cross = np.float64(0), np.float64(0)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds a batch of the layer's inputs and wanted outputs."""
        for rows, wanted in _rows(self.layer, x, y):
            self.gram = self.gram + rows.T @ rows
            self.cross = self.cross + rows.T @ wanted

    def solve(self, start: np.ndarray, gamma: np.ndarray, damping: float) -> np.ndarray:
        """The kernel (..., cin, cout) nearest to Y that Γ allows, λ |W - start|^2 included."""
        block = self.layer.block
        start = start.astype(np.float64)
        cin, cout = start.shape[-2:]
        kernel, first = np.zeros((start.size // cout, cout)), start.reshape(-1, cout)
        ridge = damping * (self.gram.diagonal().mean() or 1.0)
        kept_inputs = np.repeat(gamma != 0, block.bi, axis=0)[:cin]
        for column in range(gamma.shape[1]):  # the outputs of a block column have the same kept inputs
            outs = slice(column * block.bo, (column + 1) * block.bo)
            kept = np.flatnonzero(np.tile(kept_inputs[:, column], len(kernel) // cin))
            matrix = self.gram[np.ix_(kept, kept)] + ridge * np.eye(len(kept))
            kernel[kept, outs] = np.linalg.solve(matrix, self.cross[kept, outs] + ridge * first[kept, outs])
        return kernel.reshape(start.shape)


def _rows(layer: keras.Layer, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A layer's inputs as rows that its kernel, as a matrix, maps to outputs: float64 (n, inputs), (n, cout)."""
    inputs = int(np.prod(layouts.plane_shape(layer)[:-1]))
    y = layouts.channels_last(layouts.in_order_of_inputs(layer, y), layouts.output_axes(layer, y.ndim))
    images = max(1, _PATCH_ELEMENTS // (y[0, ..., 0].size * inputs))
    for i in range(0, len(x), images):
        rows = _multiplied_rows(layer, x[i : i + images])
        yield rows.reshape(-1, inputs).astype(np.float64), y[i : i + images].reshape(-1, y.shape[-1]).astype(np.float64)


def _multiplied_rows(layer: keras.Layer, x: np.ndarray) -> np.ndarray:
    """What each output of a layer multiplies its kernel with: (..., kernel positions * cin)."""
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return _transposed_patches(layer, x)
    if isinstance(layer, keras.layers.SeparableConv2D):
        x = ops.convert_to_numpy(layouts.multiplied(layer, ops.convert_to_tensor(x)))
    x = layouts.channels_last(x, layouts.input_axes(layer, x.ndim))
    if isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)):
        return patches(x, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
    return x


def _transposed_patches(layer: keras.layers.Conv2DTranspose, x: np.ndarray) -> np.ndarray:
    """`patches` of a transposed convolution: each channel alone goes through kernels of a single one."""
    taps = int(np.prod(layer.kernel_size))
    kernel = np.eye(taps, dtype=x.dtype).reshape(*layer.kernel_size, taps, 1)
    x = np.moveaxis(x, 1, -1) if layer.data_format == "channels_first" else x
    alone = np.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:3], 1)
    alone = np.moveaxis(alone, -1, 1) if layer.data_format == "channels_first" else alone
    found = ops.convert_to_numpy(layouts.layout(layer).product(layer, ops.convert_to_tensor(alone), kernel))
    found = np.moveaxis(found, 1, -1) if layer.data_format == "channels_first" else found
    found = found.reshape(len(x), -1, *found.shape[1:])  # n, cin, height, width, taps
    return found.transpose(0, 2, 3, 4, 1).reshape(-1, taps * x.shape[-1])


def _pairs(sparse: keras.Model, dense: keras.Model) -> list[tuple[str, Any, Any]]:
    """Name, masked layer and its layer in the dense model, of every masked layer."""
    originals = {path: layer for path, layer, _ in everywhere(dense)}
    pairs = []
    for path, layer in masked_places(sparse):
        original, shape = originals.get(path), layouts.plane_shape(layer)
        if original is None or layouts.layout(original) is None or layouts.plane_shape(original) != shape:
            raise ValueError(
                f"Layer '{path}' has a kernel {shape}, but the dense model has none like it by "
                "this name: give the model that the sparse one was made from."
            )
        if layer.trainable_gamma:
            raise ValueError(
                f"Layer '{path}' has a trainable Γ: round it with sparsify(model, ratio, importance='gamma'), and "
                "recover that."
            )
        if getattr(layer, "lora_enabled", False):
            raise ValueError(f"Layer '{path}' has LoRA: save and load the model, which merges it, and recover that.")
        pairs.append((path, layer, original))
    return pairs


def _linear(layer: keras.Layer, x: np.ndarray) -> np.ndarray:
    """A layer's outputs before bias and activation, float32."""
    kernel = layouts.from_planes(layer, effective_kernel(layer).astype(np.float32))
    product = layouts.layout(layer).product
    return ops.convert_to_numpy(product(layer, ops.convert_to_tensor(x.astype(np.float32)), kernel))


def _held(model: keras.Model, data: Any) -> list[np.ndarray]:
    """The calibration images in batches, read once."""
    if not is_graph(model) or not isinstance(model.input_shape, tuple):
        raise ValueError(
            f"'{model.name}' must be Sequential or functional and have one input to be calibrated with images; a "
            "subclassed model becomes functional with inputs = keras.Input(shape); keras.Model(inputs, "
            "model.call(inputs)), which keeps its layers and weights."
        )
    batches = [images for (images,) in image_batches(data, {model.inputs[0].name: model.input_shape[1:]})]
    if not batches:
        raise ValueError("calibration holds no images; recovery needs at least one.")
    return batches


class _Enough(BaseException):
    """Ends a computation; no Exception, which Keras would describe at length."""


def _inputs_of(layer: keras.Layer, around: Call, batch: int, times: int | None) -> list[np.ndarray]:
    """What a layer is called with in a call around it for a batch, which ends once it was called so many times."""
    seen = []

    def record(_: keras.Layer, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(ops.convert_to_numpy(ops.cast(x, "float32")))
        if len(seen) == times:
            raise _Enough
        return call(x, *args, **kwargs)

    with replaced_calls([layer], record), contextlib.suppress(_Enough):
        around.compute(batch)
    return seen
