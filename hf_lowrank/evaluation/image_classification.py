"""Accuracy, F1 and Matthews correlation of an image classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_lowrank.data.batches import make_batches, reads_media
from hf_lowrank.data.rows import load_rows, require_columns
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Step
from hf_lowrank.evaluation.text_classification import TextClassification

_NAMES = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()  # of some families several
IMAGE_CLASSIFIERS = frozenset(name for names in _NAMES for name in ([names] if isinstance(names, str) else names))


@dataclass(frozen=True)
class ImageClassification(TextClassification):
    """Accuracy of the most likely class, F1 (of class 1 where there are two, else macro) and Matthews correlation.

    Args:
        max_examples: Images at most, drawn by `seed`.
        label_column: Class, as a number or as a name in the model's `label2id`; in a folder of images the name of the
            folder an image lies in.
    """

    name: ClassVar[str] = "image-classification"
    needs: ClassVar[tuple[str, ...]] = ("image", "label")
    heads: ClassVar = IMAGE_CLASSIFIERS
    reads_text: ClassVar[bool] = False

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        if not reads_media(tokenizer):
            raise InputError("Images need an image processor, and there is none. Give it as tokenizer=.")
        rows = load_rows(examples, self.max_examples, self.seed)
        require_columns(rows, [self.label_column], f"{self.name} needs labels: set label_column.")
        read_label = self._label_reader(model)
        images = [{name: value for name, value in row.items() if name != self.label_column} for row in rows]
        batches = make_batches(images, tokenizer, len(rows), batch_size=batch_size)
        labels = [read_label(row[self.label_column]) for row in rows]
        return [Step(batch, labels[place * batch_size :][:batch_size]) for place, batch in enumerate(batches)]


TASK = ImageClassification
