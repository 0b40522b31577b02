"""Training on several processes, which exchange values through MPI.

>>> import nplora
>>> nplora.distributed.Alone().size
1
"""

from nplora.distributed.communicator import Alone, Communicator, RankError
from nplora.distributed.mpi import MPICommunicator
from nplora.distributed.network import Network
from nplora.distributed.ordered_sum import OrderedSum

__all__ = ["Alone", "Communicator", "MPICommunicator", "Network", "OrderedSum", "RankError"]
