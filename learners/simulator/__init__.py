"""Simulated learners: who learn by practising, forget, tire, have needs, and react to what is recommended to them.

The logs of real learners cannot answer what would have happened under another recommendation; these learners can. NumPy
only; everything is drawn from one seed, and a learner depends on its own number alone, never on the others.

**Success.** Learner l answers item i of category c right at the first attempt with probability

    P = g + (1 - g - s) M,   M = sigmoid(a * (theta_c(t) - b_i - h * (1 - R_c) - f * n - k))

a four-parameter logistic item response (Barton and Lord 1981): guessing g, slips s, discrimination a = 1.4; b_i is the
item's difficulty in logits, about 0.55 per level around level 5. R_c, the readiness, is the mean over the category's
prerequisites of sigmoid(theta_p(t) + 0.5), 1 where there are none; h = 1.2. f is the fatigue per task, n the tasks of this
session so far; k is the cost of reading load for a learner with a reading need, times the subject's load.

**Learning.** A task changes the skill by

    theta_c <- min(4, theta_c(t) + eta * R_c * 4 M (1 - M) * (1 if right else 0.6))

so most is learnt from tasks that are neither trivial nor hopeless (Vygotsky's zone of proximal development, in the form
that Elo-like models use) and when the prerequisites are there. eta varies between learners around 0.18.

**Forgetting.** What was learnt above the skill that the learner came with decays exponentially (Ebbinghaus 1885):

    theta_c(t) = theta_c0 + (theta_c - theta_c0) * exp(-days since practice / tau_c),   tau_c = 12 * m * sqrt(1 + practices of c)

m is the learner's retention. Practice makes the next decay slower.

**Needs** change parameters, see ``profiles``: attention (slips, fatigue, short sessions), reading (time, hints, cost of
reading load), processing-speed (time, shorter sessions), memory (retention). They are in the learner's ``profile`` and never
in the rows.

**Curriculum**, where nobody recommends: each subject is a sequence of categories. The learner stays in a category until 3 of
the last 4 answers were right or 6 tasks are done, with a task of its prerequisite in between now and then, and mostly goes on
to the next, sometimes reviews an earlier one or changes the subject; three wrong answers in a row lead back to a
prerequisite. The level follows a staircase with jitter.
"""

from learners.simulator.curriculum import Category, Curriculum, Item
from learners.simulator.learner import SimulatedLearner, Task
from learners.simulator.profiles import NEED_PROFILES, NeedProfile
from learners.simulator.simulation import ROW_COLUMNS, Simulator, simulate_rows

__all__ = [
    "NEED_PROFILES",
    "ROW_COLUMNS",
    "Category",
    "Curriculum",
    "Item",
    "NeedProfile",
    "SimulatedLearner",
    "Simulator",
    "Task",
    "simulate_rows",
]
