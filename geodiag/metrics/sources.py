"""Papers and reports that metrics are taken from, as docs/metrics.md cites them."""

MHC = "arXiv 2512.24880 §3.1"
MHC_FIGURE_8 = "arXiv 2512.24880 Fig. 8"
DEEPSEEK_V4 = "arXiv 2606.19348"
ANTICIPATORY = "arXiv 2606.19348 §4.2.3"
EXPERT_NORMS = "arXiv 2602.10604"
LOAD_BALANCE = "arXiv 2408.15664"
