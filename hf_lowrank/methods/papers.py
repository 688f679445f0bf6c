"""The paper behind each method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One publication.

    Args:
        key: Of its BibTeX entry.
        venue: Where it appeared; arXiv papers give their number too.
    """

    key: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str | None = None

    @property
    def bibtex(self) -> str:
        """The entry."""
        rows = {"title": self.title, "author": self.authors, "year": str(self.year), "booktitle": self.venue}
        if self.arxiv is not None:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in rows.items())
        return f"@inproceedings{{{self.key},\n{body}\n}}"


REN = Paper(
    "ren2022exploring",
    "Exploring Extreme Parameter Compression for Pre-trained Language Models",
    "Ren, Yuxin and Wang, Benyou and Shang, Lifeng and Jiang, Xin and Liu, Qun",
    2022,
    "International Conference on Learning Representations",
    "2205.10036",
)
LPAF = Paper(
    "ren2024lowrank",
    "Low-Rank Prune-And-Factorize for Language Model Compression",
    "Ren, Siyu and Zhu, Kenny Q.",
    2024,
    "LREC-COLING",
    "2306.14152",
)
GPTQ = Paper(
    "frantar2023gptq",
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan",
    2023,
    "International Conference on Learning Representations",
    "2210.17323",
)
ECKART_YOUNG = Paper(
    "eckart1936approximation",
    "The approximation of one matrix by another of lower rank",
    "Eckart, Carl and Young, Gale",
    1936,
    "Psychometrika 1(3)",
)
FWSVD = Paper(
    "hsu2022fwsvd",
    "Language model compression with weighted low-rank factorization",
    "Hsu, Yen-Chang and Hua, Ting and Chang, Sungen and Lou, Qian and Shen, Yilin and Jin, Hongxia",
    2022,
    "International Conference on Learning Representations",
    "2207.00112",
)
SVD_LLM = Paper(
    "wang2025svdllm",
    "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    "Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi",
    2025,
    "International Conference on Learning Representations",
    "2403.07378",
)
LEMS = Paper(
    "thoma2026lems",
    "Advancing SVD-based LLM Compression via Layer-Wise Error Model Search",
    'Thoma, Moritz and Groezinger, Maximilian and Forstenh{\\"a}usler, Maximilian and Aghajanzadeh, Emad and '
    "Vemparala, Manoj-Rohit and Anagnostopoulos, Christos and Mori, Pierpaolo and Fasfous, Nael and "
    "Frickenstein, Alexander and Mueller-Gritschneder, Daniel and Schlichtmann, Ulf",
    2026,
    "International Conference on Machine Learning",
)
TFWSVD = Paper(
    "hua2022numerical",
    "Numerical Optimizations for Weighted Low-rank Estimation on Language Models",
    "Hua, Ting and Hsu, Yen-Chang and Wang, Felicity and Lou, Qian and Shen, Yilin and Jin, Hongxia",
    2022,
    "Conference on Empirical Methods in Natural Language Processing",
    "2211.09718",
)
OSELEDETS = Paper(
    "oseledets2011tensor",
    "Tensor-Train Decomposition",
    "Oseledets, Ivan V.",
    2011,
    "SIAM Journal on Scientific Computing 33(5)",
)
SHARED_TRAIN = Paper(
    "liu2023enhancing",
    "Enhancing Scalability of Pre-trained Language Models via Efficient Parameter Sharing",
    "Liu, Peiyu and Gao, Ze-Feng and Chen, Yushuo and Zhao, Wayne Xin and Wen, Ji-Rong",
    2023,
    "Findings of the Association for Computational Linguistics: EMNLP",
    "2303.16753",
)
KRONECKER = Paper(
    "vanloan1993approximation",
    "Approximation with Kronecker Products",
    "Van Loan, Charles F. and Pitsianis, Nikos P.",
    1993,
    "Linear Algebra for Large Scale and Real-Time Applications",
)
BANAEI = Paper(
    "banaei2023revisiting",
    "Revisiting Offline Compression: Going Beyond Factorization-based Methods for Transformer Language Models",
    "Banaei, Mohammadreza and Ba{\\l}azy, Klaudia and Kasymov, Artur and Lebret, R{\\'e}mi and Tabor, Jacek and "
    "Aberer, Karl",
    2023,
    "Findings of the Association for Computational Linguistics: EACL",
    "2302.04045",
)
