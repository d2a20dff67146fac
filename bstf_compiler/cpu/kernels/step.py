"""A row of the table that `bstf_compiler.cpu.kernels.network` walks through."""

from __future__ import annotations

import numpy as np

# What a step does. LOAD: images pixel by pixel to channels. SPLIT: an image to those of every n-th row and column, for
# strided convolutions. ZERO_MAX_POOL: pixels of the padding take part, as zeros; for the other pools there are none.
# CONCAT: nothing, since its parts are written side by side. TO_TILES and FROM_TILES: before and after the products of a
# convolution by Winograd's method. FUNCTION: of one value. RESIZE: several pixels of one. PIXELS: several of the
# channels of one, and crops.
(
    LOAD, CONV, SPLIT, ELEMENTWISE, MAX_POOL, ZERO_MAX_POOL, MEAN_POOL, CONCAT, TO_TILES, FROM_TILES, FUNCTION, RESIZE,
    PIXELS,
) = range(13)  # fmt: skip
# How an elementwise step joins its second input.
SUM, DIFFERENCE, PRODUCT = range(3)

STEP = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "tasks",
            # Input and output: where the first pixel is, elements to the next plane and row, rows to the next image.
            *("x", "x_plane", "x_pitch", "x_rows", "x_height", "x_width"),
            *("y", "y_plane", "y_pitch", "y_rows", "y_height", "y_width"),
            # Of the output: zeros before the first pixel; elements that are computed; planes; where its mask is, or -1.
            *("lead", "length", "planes", "mask"),
            # Elements of scratch that a thread needs.
            "scratch",
            # What stands for zero; a tensor to add, or -1; channels of the image to load or that PIXELS makes, planes
            # of channels that FUNCTION makes, else planes of the input.
            *("zero", "other", "other_plane", "images", "channels"),
            # Where the first image to load is among those of all inputs.
            "image",
            # How to join the other tensor; from an image of it to the next if it has one pixel for all, or 0.
            *("join", "other_image"),
            # Address of the loop of a FUNCTION in float32.
            "function",
            # Convolutions: where their weights are.
            *("values", "offsets", "starts", "bias"),
            # Tiles of output channels; tiles of pixels of three vectors, then two, then one.
            *("tiles", "wide", "middle", "narrow"),
            # Convolutions with several parts: tiles of output channels of a part, after which a plane is left out.
            # To and from tiles: planes of a part.
            "part",
            # Elements from a plane to the next where tiles read them: in the input, or in panels, each the pixels of a
            # tile, that a task packs first. Elements of a panel, or 0.
            *("stride", "panel"),
            # Parts into which the tiles of pixels are cut; whether tiles of channels are the outer loop; the shape of
            # tiles (`bstf_compiler.cpu.kernels.conv`) and their planes of output.
            *("parts", "channels_first", "shape", "tile_planes"),
            # Where among the biases an elementwise operation has a factor and a summand for each channel, or -1, a mean
            # of words a factor for each pixel, and FROM_TILES a summand for each channel; a load of words a factor and
            # a summand in float32; FUNCTION the table of words; RESIZE weights for each row, then each column, that it
            # makes of one: of the pixel before, of this and of the next one.
            "scale",
            # Words: a convolution's sums lose `shift` bits; then its result, or the input, gains `up` bits, the tensor
            # to add gains `other_up`, and the total loses `cut`.
            *("shift", "up", "other_up", "cut"),
            # Windows: padding, strides (1 for a pool of one column), size. A split has the rows and columns of its grid
            # of images as the size; RESIZE and PIXELS those that they make of one pixel, and PIXELS what is cropped as
            # the padding.
            *("top", "left", "down", "across", "window_height", "window_width"),
        )
    ]
    # Bounds of the result; of a load of words those of the image, and a factor from images to integers; of a FUNCTION
    # its parameter.
    + [(name, np.float64) for name in ("low", "high", "factor")]
)
