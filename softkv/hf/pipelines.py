"""transformers' pipelines accept a `SoftModel` but warn that its class is not on their list."""

import logging

_TASKS = ("text-generation", "text-classification", "token-classification")
_UNKNOWN = tuple(f"The model 'SoftModel' is not supported for {task}." for task in _TASKS)


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_UNKNOWN)


def suppress_unsupported_warning() -> None:
    """Suppress the warning that pipelines log about `SoftModel`."""
    logger = logging.getLogger("transformers.pipelines.base")
    if not any(isinstance(each, _Known) for each in logger.filters):
        logger.addFilter(_Known())
