import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from bstf.quantization.adjust import Positions, adjust, check, shifts
from bstf.quantization.fold import flatten
from bstf.quantization.network import Weights


def residual():
    """Input -> conv a -> pool -> conv b -> add with the pool's result -> dense."""
    entry = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="a", bias_initializer="ones")(entry)
    x = layers.MaxPooling2D(name="pool")(x)
    y = layers.Conv2D(4, 3, padding="same", name="b", bias_initializer="ones")(x)
    y = layers.Add(name="add")([x, y])
    y = layers.GlobalAveragePooling2D(name="mean")(y)
    return flatten(keras.Model(entry, layers.Dense(3, name="d", bias_initializer="ones")(y)))


@pytest.fixture(scope="module")
def network():
    return residual()


def good():
    return Positions(
        activation={"image": 6, "a": 4, "b": 4, "add": 4, "d": 3},
        kernel={"a": 8, "b": 8, "d": 8},
        bias={"a": 7, "b": 7, "d": 7},
    )


def changed(**tables):
    positions = good()
    for table, values in tables.items():
        getattr(positions, table).update(values)
    return positions


def test_good_positions_stay(network):
    positions = good()
    assert adjust(network, positions) == good()
    assert positions == good()


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        # shift of the sum below 0: the output becomes coarser
        ({"kernel": {"d": -3}}, {"kernel": {"d": -3}, "activation": {"d": 1}, "bias": {"d": 1}}),
        # above 16: the kernel becomes coarser
        ({"kernel": {"d": 20}}, {"kernel": {"d": 15}}),
        # shift of the bias below 0: the bias becomes coarser
        ({"bias": {"b": 15}}, {"bias": {"b": 12}}),
        # above 16: the kernel becomes coarser, the bias doesn't clip
        ({"bias": {"b": -8}}, {"bias": {"b": -8}, "kernel": {"b": 4}}),
        # inputs of an add more than 15 apart: the finer becomes coarser, then its kernel and bias
        (
            {"activation": {"b": -12, "add": -10}},
            {"activation": {"a": 3, "b": -12, "add": -10, "d": -2}, "kernel": {"a": 8, "b": 1, "d": 8}},
        ),
        # cut of an add above 16: its finer input becomes coarser
        ({"activation": {"add": -14}}, {}),
        # result of an add more than 15 finer than its finer input: the result becomes coarser
        ({"activation": {"add": 30}}, {"activation": {"add": 19}}),
    ],
)
def test_every_rule(network, tables, expected):
    before = changed(**tables)
    after = adjust(network, before)
    check(network, after)
    for name in ("activation", "kernel", "bias"):
        old, new = getattr(before, name), getattr(after, name)
        assert all(new[key] <= old[key] for key in old)
        for key, value in expected.get(name, {}).items():
            assert new[key] == value, (name, key)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ({"a": 4, "b": -3, "c": 5}, {"a": 4, "b": -3, "c": 5}),
        ({"a": 4, "b": -3, "c": 14}, {"a": 4, "b": -3, "c": 12}),  # 15 finer than its coarsest part
        ({"a": 4, "b": -3, "c": -14}, {"a": 2, "b": -3, "c": -14}),  # a part is cut by 16 bits at most
    ],
)
def test_parts_of_a_concatenation_are_shifted_within_limits(activation, expected):
    entry = keras.Input((4, 4, 4), name="image")
    parts = [layers.Conv2D(4, 1, name=name)(entry) for name in "ab"]
    net = flatten(keras.Model(entry, layers.Concatenate(name="c")(parts)))
    before = Positions({"image": 6, **activation}, {"a": 8, "b": 2}, {"a": 7, "b": 7})
    after = adjust(net, before)
    assert after.activation == {"image": 6, **expected}
    limited = [shift.operation for shift in shifts(net, before)]
    assert limited.count("c") == 2


def test_a_lowered_pool_input_reaches_the_convolution_before_it(network):
    after = adjust(network, changed(activation={"add": -14}))
    assert after.activation["a"] == after.activation["b"] == 2  # -14 + 16
    assert after.kernel["a"] == 8


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pools_and_concatenations_after_the_cuts_break_none(chain, data):
    """Conv - Add - Concat - Pool: what a later rule lowers, the earlier rules see again."""
    near = st.integers(-20, 32)
    owners = dict.fromkeys(chain.grids().values())
    weights = [op.name for op in chain.operations.values() if isinstance(op, Weights)]
    before = Positions(
        {name: data.draw(near) for name in owners},
        {name: data.draw(st.integers(-10, 32)) for name in weights},
        {name: data.draw(near) for name in weights},
    )
    after = adjust(chain, before)
    activation, kernel, bias = after.activation, after.kernel, after.bias
    for name, source in (("a", "image"), ("b", "image"), ("end", "concat")):
        assert 0 <= kernel[name] + activation[source] - activation[name] <= 16
        assert 0 <= kernel[name] + activation[source] - bias[name] <= 16
    assert abs(activation["a"] - activation["b"]) <= 15
    assert -15 <= max(activation["a"], activation["b"]) - activation["add"] <= 16
    for part in ("a", "add"):
        assert -15 <= activation[part] - activation["concat"] <= 16
    assert chain.grids()["pool"] == "concat"  # in = out


@pytest.fixture(scope="module")
def chain():
    entry = keras.Input((8, 8, 4), name="image")
    a, b = (layers.Conv2D(4, 3, padding="same", name=name, bias_initializer="ones")(entry) for name in "ab")
    x = layers.Concatenate(name="concat")([a, layers.Add(name="add")([a, b])])
    x = layers.AveragePooling2D(2, name="pool")(x)
    return flatten(keras.Model(entry, layers.Conv2D(2, 1, name="end", bias_initializer="ones")(x)))


def test_a_fine_sum_stays_as_fine_as_its_inputs_allow(network):
    """Vitis AI's rule for the result of an add sets it to 15 (or -15), whatever its inputs' positions are."""
    after = adjust(network, changed(activation={"a": -3, "b": -3, "add": 30}))
    assert after.activation["add"] == 12


def test_a_cut_below_zero_never_saturates_weights(network):
    """Vitis AI for TensorFlow 2 raises the kernel's position there, which clips the weights."""
    after = adjust(network, changed(kernel={"a": -5, "b": -5, "d": -5}))
    assert after.kernel == {"a": -5, "b": -5, "d": -5}


def test_a_bias_of_zeros_follows_its_sum():
    model = keras.Sequential([keras.Input((4,), name="x"), layers.Dense(3, name="d")])
    net = flatten(model)
    after = adjust(net, Positions({"x": 5, "d": 4}, {"d": 30}, {"d": 7}))
    assert after.kernel["d"] == 15
    assert after.bias["d"] == 20
    after = adjust(net, Positions({"x": 5, "d": 4}, {"d": 3}, {"d": -40}))
    assert after.bias["d"] == 8


def test_unbounded_positions_are_refused_by_name():
    entry = keras.Input((4, 4, 4), name="image")
    x = layers.Conv2D(4, 1, name="huge")(entry)
    net = flatten(keras.Model(entry, layers.Add(name="add")([entry, x])))
    positions = Positions({"image": 6, "huge": 4, "add": 4}, {"huge": -40}, {"huge": 0})
    with pytest.raises(ValueError, match=r"(huge|add).*weights are too large"):
        adjust(net, positions)


def test_check_names_operation_shift_and_range(network):
    with pytest.raises(ValueError, match=r"'b' needs a shift of the sum of 20; possible are 0 to 16"):
        check(network, changed(kernel={"b": 20}, bias={"b": 16}))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_positions_reach_the_limits_from_above(network, data):
    near = st.integers(-20, 32)
    positions = Positions(
        {name: data.draw(near) for name in good().activation},
        {name: data.draw(st.integers(-10, 32)) for name in good().kernel},
        {name: data.draw(near) for name in good().bias},
    )
    after = adjust(network, positions)
    assert adjust(network, after) == after
    for shift in shifts(network, after):
        assert shift.low <= shift.value <= shift.high
    for before_table, after_table in zip(vars(positions).values(), vars(after).values()):
        assert all(after_table[name] <= before_table[name] for name in before_table)


def test_every_weighted_layer_and_add_is_limited(network):
    limited = {shift.operation for shift in shifts(network, good())}
    assert limited == {"add"} | {op.name for op in network.operations.values() if isinstance(op, Weights)}
    assert np.all([op.bias.any() for op in network.operations.values() if isinstance(op, Weights)])
