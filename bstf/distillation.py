"""Training with a teacher: a sparse student learns the dense model's whole answer, not the label alone."""

from typing import Any, NamedTuple

import keras
from keras import ops

from bstf.places import is_graph

_SMALLEST = 1e-7  # probability whose logarithm is still taken


class _Models(NamedTuple):
    student: keras.Model
    teacher: keras.Model


class Distiller(keras.Model):
    """A student that trains with a teacher's answers as well as the labels (Hinton et al. 2015, arXiv 1503.02531).

    loss = soft_weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - soft_weight) * hard loss
           + regularisers

    where the hard loss is the one it is compiled with and T^2 keeps the two gradients in proportion whatever T.
    The model has the student's own layers: `fit`, `evaluate`, metrics and callbacks work as with the student,
    `bstf.callbacks.BlockSparsity` included, and what is trained is the student. `save`, and so `ModelCheckpoint`,
    writes the student. The teacher computes in inference mode and is never changed. In `evaluate` and in
    validation the loss is the hard one alone.

    Args:
        student: Sequential or functional classifier; probabilities or (without a softmax at the end) logits.
        teacher: takes the same inputs and has as many outputs; often the model the student was made from.
        temperature: T, above 0; larger shows more of how the teacher ranks the wrong classes.
        soft_weight: share of the teacher in the loss, in [0, 1].

    Raises:
        ValueError: an argument is out of range, or the two models don't have the same outputs.

    Example:
        >>> distiller = bstf.Distiller(sparse, teacher=model)
        >>> distiller.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> distiller.fit(x, y, epochs=5)
        >>> sparse.save("sparse.keras")
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        temperature: float = 4.0,
        soft_weight: float = 0.9,
    ):
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature!r}.")
        if not 0 <= soft_weight <= 1:
            raise ValueError(f"soft_weight is the teacher's share of the loss, in [0, 1]; got {soft_weight!r}.")
        if student.output_shape != teacher.output_shape:
            raise ValueError(
                f"The student '{student.name}' has outputs {student.output_shape} and the teacher '{teacher.name}' "
                f"{teacher.output_shape}: distillation compares them one by one."
            )
        inputs, outputs = (one[0] if len(one) == 1 else one for one in (student.inputs, student.outputs))
        super().__init__(inputs=inputs, outputs=outputs, name=student.name)
        self.temperature, self.soft_weight = temperature, soft_weight
        # In a function Keras doesn't track them: the teacher's weights aren't this model's, the student's are already.
        models = _Models(student, teacher)
        self._models = lambda: models
        self._divergence = keras.losses.KLDivergence()

    @property
    def student(self) -> keras.Model:
        """The model that is trained."""
        return self._models().student

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The weighted sum of both losses in training, the hard loss otherwise."""
        hard = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return hard
        models = self._models()
        taught = ops.stop_gradient(models.teacher(x, training=False))
        soft = self._divergence(
            self._softened(models.teacher, taught), self._softened(models.student, y_pred), sample_weight
        )
        # Regularisers, which Keras adds to the loss it is compiled with, count whole whatever the teacher's share.
        penalty = sum(self._aggregate_additional_loss(one) for one in self.losses)
        return self.soft_weight * self.temperature**2 * soft + (1 - self.soft_weight) * (hard - penalty) + penalty

    def _softened(self, model: keras.Model, outputs: Any) -> Any:
        outputs = ops.cast(outputs, "float32")
        # Up to a constant, which the softmax takes away, the logits are the logarithms of the probabilities.
        logits = ops.log(ops.maximum(outputs, _SMALLEST)) if ends_in_softmax(model) else outputs
        return ops.softmax(logits / self.temperature)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Saves the student, as `student.save`."""
        self.student.save(*args, **kwargs)


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model's outputs are probabilities: its last layer is a softmax or has one as activation."""
    last = model.layers[-1]
    if is_graph(last):
        return ends_in_softmax(last)
    softmax = getattr(last, "activation", None) is keras.activations.softmax
    return softmax or isinstance(last, keras.layers.Softmax)
