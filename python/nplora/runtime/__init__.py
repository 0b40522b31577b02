"""Support for the running process: threads, machine information, mapped files, and standard error."""

from nplora.runtime.threads import (
    get_num_threads,
    obey_threadpoolctl,
    release_memory,
    set_num_threads,
    show_config,
)

__all__ = ["get_num_threads", "release_memory", "set_num_threads", "show_config"]

obey_threadpoolctl()
