"""Which adapters have which form."""

from fedlora.adapter import Adapter
from fedlora.exporting.forms import Form
from fedlora.exporting.gguf_adapter import unfit_for_gguf_adapter
from fedlora.exporting.gguf_layout import unsupported
from fedlora.exporting.one_rank import unfit_for_one_rank
from fedlora.exporting.write import unfit, unfit_for_peft
from fedlora.models.adapted import AdaptedModel


def unfit_for(form: Form, adapter: Adapter, adapted: AdaptedModel) -> str | None:
    """Reason why the adapter of this model has no such form; None if it has."""
    match form:
        case "adapter":
            return unfit_for_peft(adapter, adapted)
        case "serving":
            return unfit_for_one_rank(adapter, adapted)
        case "merged":
            return unfit(adapter)
        case "gguf-adapter":
            return unfit_for_gguf_adapter(adapter, adapted)
        case "gguf-merged":
            return unfit(adapter) or unsupported(adapted.model.config)
