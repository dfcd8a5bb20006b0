"""The copy in host memory that a save in the background writes from."""

from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import BlockingAsyncStager


class KeptStager(BlockingAsyncStager):
    """Copies the state while training stands still, into memory that it keeps from the first save on.

    PyTorch's own keeps only pinned memory. To be given memory by the system takes longer than to copy to it.
    """

    def __init__(self, *, pinned: bool) -> None:
        super().__init__(cache_staged_state_dict=True)
        self.pinned = pinned

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """The state on the CPU, until the next call."""
        if self.state_dict_cache is None:
            self.state_dict_cache = _create_cpu_state_dict(state_dict, pin_memory=self.pinned)
        return _copy_state_dict(state_dict, self.state_dict_cache)
