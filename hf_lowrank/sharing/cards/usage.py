"""How to load a model: as few lines as do it."""

from hf_lowrank.hosts.heads import auto_class
from hf_lowrank.records.report import CompressionReport
from hf_lowrank.remote_code import modeling_lowrank

SENTENCES = "sentence-transformers"
# auto class -> the task of the Hub it stands for
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
# task -> what a pipeline is given; others are loaded as a model and a tokenizer
_EXAMPLES = {
    "feature-extraction": '"Low rank is often enough."',
    "fill-mask": 'f"Paris is the {run.tokenizer.mask_token} of France."',
    "text-classification": '"What a wonderful film!"',
    "text-generation": '"Once upon a time"',
    "token-classification": '"Ada Lovelace lived in London."',
}


def pipeline_tag(report: CompressionReport) -> str | None:
    """The task of the Hub: the one the dense model's card names or, without one, the one its head is for."""
    return report.origin.pipeline_tag or _TASKS.get(_auto_class(report))


def snippet(report: CompressionReport, repo: str) -> str:
    """Python that loads the model from `repo`, a Hub id or a folder, and runs it."""
    if report.origin.library_name == SENTENCES:
        return _lines(
            "from sentence_transformers import SentenceTransformer",
            "",
            f'encoder = SentenceTransformer("{repo}", trust_remote_code=True)',
            'embeddings = encoder.encode(["Low rank is often enough.", "A second sentence."])',
        )
    auto = _auto_class(report)
    task = _TASKS.get(auto, "")
    if task in _EXAMPLES:
        return _lines(
            "from transformers import pipeline",
            "",
            f'run = pipeline("{task}", model="{repo}", trust_remote_code=True)',
            f"run({_EXAMPLES[task]})",
        )
    return _lines(
        f"from transformers import AutoTokenizer, {auto}",
        "",
        f'model = {auto}.from_pretrained("{repo}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)',
    )


def _auto_class(report: CompressionReport) -> str:
    return auto_class(getattr(modeling_lowrank, report.architecture)) or "AutoModel"


def _lines(*lines: str) -> str:
    return "\n".join(lines)
