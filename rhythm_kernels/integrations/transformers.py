"""`attn_implementation="rhythm"` for transformers models: attention that gives its log-sum-exp as it is computed.

    from rhythm_kernels.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="rhythm")

The first probe or calibration of a process registers it as well, so `model.set_attn_implementation("rhythm")` works
from then on. Importing rhythm_kernels alone does not: that needs torch only.
"""

from ..probe.rhythm_attention import NAME, register

__all__ = ["NAME", "register"]
