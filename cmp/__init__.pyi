from .budgets import Cost as Cost
from .budgets import step_cost as step_cost
from .budgets import steps_for as steps_for
from .config import Method as Method
from .config import RunConfig as RunConfig
from .config import Schedule as Schedule
from .config import Training as Training
from .data import Corpus as Corpus
from .data import load_data as load_data
from .errors import CmpError as CmpError
from .evaluation import evaluate as evaluate
from .experiments.runs import run as run
from .merging.apply import merge as merge
from .merging.files import merge_files as merge_files
from .merging.policies import MergedWeights as MergedWeights
from .merging.policies import TaskEnd as TaskEnd
from .mixtures import MixtureSampler as MixtureSampler
from .mixtures import task_pools as task_pools
from .models import create_model as create_model
from .models import load_model as load_model
from .registry import load_plugin as load_plugin
from .registry import option_names as option_names
from .registry import register as register
from .schedules import TaskSchedule as TaskSchedule
from .schedules import learning_rate as learning_rate
from .schedules import lr_scheduler as lr_scheduler
from .training import ForwardOutput as ForwardOutput
from .training import StepResult as StepResult
from .training import TrainState as TrainState
from .training import UpdateMethod as UpdateMethod
from .training import create_optimizer as create_optimizer
from .training import make_train_state as make_train_state
from .training import train_step as train_step
from .training import train_task as train_task

NUMERICS: int
__version__: str
