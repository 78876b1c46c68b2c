"""One file a command. Each parses, calls and prints; torch is imported only inside those that compute."""

from .bench import bench
from .doctor import doctor
from .evaluate import evaluate
from .explain import explain
from .merge import merge
from .predict import predict
from .report import report
from .select import select
from .train import train
from .tune import tune

# in the order of `pefast --help`
COMMANDS = (train, evaluate, predict, report, merge, select, explain, bench, tune, doctor)
