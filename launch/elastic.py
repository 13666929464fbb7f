"""torchrun, without the traceback of its own that would bury the line in which a rank has said why it ended."""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    try:
        run.main()
    except (ChildFailedError, SignalException):
        sys.exit(1)
