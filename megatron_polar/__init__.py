"""Train POLAR reward models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# On every import Megatron-Core says ten times that Apex and Transformer Engine are missing, and it uses a few names
# that torch will retire. `train` says once which layers, attention and optimizer really run.
for _message in (
    r".*(Apex|Transformer Engine|cuda_graph_scope|full scope|not a leaf Tensor).*",
    r".*(ShardedTensor|`load_state_dict` is deprecated|is deprecated\. Please use `torch\.distributed).*",
):
    warnings.filterwarnings("ignore", message=_message)
del _message
