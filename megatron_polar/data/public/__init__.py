"""Published data sets, read from their publishers' own files; the importers yield the input lines of `records.py`.

Every reader is a generator and counts what it leaves out in `skipped`, by reason. Draws depend on a seed and on the
text drawn for, never on the order of files, so that adding a file changes nothing for the prompts it does not touch.
Nothing is downloaded: paths are the user's.
"""

from megatron_polar.data.public.alpaca_eval import (
    ALPACA_EVAL_ANNOTATOR,
    alpaca_eval_preferences,
    alpaca_eval_trajectories,
)
from megatron_polar.data.public.files import Record, import_records, write_records
from megatron_polar.data.public.gsm8k import gsm8k_preferences, gsm8k_split
from megatron_polar.data.public.hh_rlhf import hh_rlhf_preferences
from megatron_polar.data.public.judgebench import judgebench_answers
from megatron_polar.data.public.judged import Answer, JudgedAnswers
from megatron_polar.data.public.reward_bench_2 import reward_bench_2_answers
from megatron_polar.data.public.rm_bench import rm_bench_answers
from megatron_polar.data.public.rmb import rmb_preferences, rmb_published

__all__ = (
    "ALPACA_EVAL_ANNOTATOR",
    "Answer",
    "JudgedAnswers",
    "Record",
    "alpaca_eval_preferences",
    "alpaca_eval_trajectories",
    "gsm8k_preferences",
    "gsm8k_split",
    "hh_rlhf_preferences",
    "import_records",
    "judgebench_answers",
    "reward_bench_2_answers",
    "rm_bench_answers",
    "rmb_preferences",
    "rmb_published",
    "write_records",
)
