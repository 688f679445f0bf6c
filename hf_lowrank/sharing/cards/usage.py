"""How to load a model: as few lines as do it."""

from typing import Any

from hf_lowrank.hosts.heads import auto_class
from hf_lowrank.hosts.outputs import kind_of_head
from hf_lowrank.records.report import CompressionReport
from hf_lowrank.remote_code import modeling_lowrank

SENTENCES = "sentence-transformers"
# auto class -> the task of the Hub it stands for
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForTokenClassification": "token-classification",
}
# task -> what a pipeline is given; others are loaded as a model and what makes its inputs
_EXAMPLES = {
    "audio-classification": '"sound.wav"',
    "automatic-speech-recognition": '"speech.wav"',
    "feature-extraction": '"Low rank is often enough."',
    "fill-mask": 'f"Paris is the {run.tokenizer.mask_token} of France."',
    "image-classification": '"photo.jpg"',
    "text-classification": '"What a wonderful film!"',
    "text-generation": '"Once upon a time"',
    "token-classification": '"Ada Lovelace lived in London."',
}
# auto class -> the task of `evaluate` for what it says
_SCORED = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModelForPreTraining": "masked-lm",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "seq2seq-lm",
    "AutoModelForSequenceClassification": "text-classification",
}
# what a classifier's head says where that is no class -> the task for it
_OTHER_HEADS = {"number": "text-regression", "labels": "agreement"}
# what a model reads -> what makes it, and what that is called; of text it is a tokenizer
_READERS = {
    "pixel_values": ("AutoImageProcessor", "processor"),
    "input_features": ("AutoFeatureExtractor", "processor"),
    "input_values": ("AutoFeatureExtractor", "processor"),
}


def pipeline_tag(report: CompressionReport) -> str | None:
    """The task of the Hub: the one the dense model's card names or, without one, the one its head is for."""
    return report.origin.pipeline_tag or _task(report)


def snippet(report: CompressionReport, repo: str) -> str:
    """Python that loads the model from `repo`, a Hub id or a folder, and runs it."""
    if report.origin.library_name == SENTENCES:
        return _lines(
            "from sentence_transformers import SentenceTransformer",
            "",
            f'encoder = SentenceTransformer("{repo}", trust_remote_code=True)',
            'embeddings = encoder.encode(["Low rank is often enough.", "A second sentence."])',
        )
    auto, task = _auto_class(report), _task(report)
    reader, name = _READERS.get(_model_class(report).main_input_name, ("AutoTokenizer", "tokenizer"))
    if task in _EXAMPLES:
        return _lines(
            "from transformers import pipeline",
            "",
            f'run = pipeline("{task}", model="{repo}", trust_remote_code=True)',
            f"run({_EXAMPLES[task]})",
        )
    return _lines(
        f"from transformers import {', '.join(sorted([reader, auto]))}",
        "",
        f'model = {auto}.from_pretrained("{repo}", trust_remote_code=True)',
        f'{name} = {reader}.from_pretrained("{repo}", trust_remote_code=True)',
    )


def evaluation_task(report: CompressionReport, model: Any) -> str:
    """The task of `evaluate` for the model's head; agreement with the dense model where there is none of its own."""
    if report.origin.library_name == SENTENCES:
        return "similarity"
    task = _SCORED.get(_auto_class(report), "agreement")
    return _OTHER_HEADS.get(kind_of_head(model), task) if task == "text-classification" else task


def loading_line(report: CompressionReport, repo: str) -> str:
    """One line that loads the model from `repo`, a Hub id or a folder, as what it is."""
    is_encoder = report.origin.library_name == SENTENCES
    load = "SentenceTransformer" if is_encoder else f"{_auto_class(report)}.from_pretrained"
    return f"{load}({repo!r}, trust_remote_code=True)"


def _task(report: CompressionReport) -> str | None:
    auto = _auto_class(report)
    if auto == "AutoModel" and _model_class(report).main_input_name in _READERS:
        return "image-feature-extraction" if _model_class(report).main_input_name == "pixel_values" else None
    return _TASKS.get(auto)


def _model_class(report: CompressionReport) -> Any:
    return getattr(modeling_lowrank, report.architecture)


def _auto_class(report: CompressionReport) -> str:
    return auto_class(_model_class(report)) or "AutoModel"


def _lines(*lines: str) -> str:
    return "\n".join(lines)
