"""What does a learner's arithmetic: NumPy, or the compiled kernel where there is a compiler."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np

from aivo_core.engine.contract import EngineError, LearnerTask, LocalTrainingConfig
from aivo_core.engine.passes import PassOutcome
from aivo_core.engine.private import SystemChance, train_privately
from aivo_core.engine.private_reference import NumpyPrivateTail
from aivo_core.engine.reference import train_learner
from aivo_core.engine.tail import TailBase, TailLayout

log = logging.getLogger(__name__)

Trainer = Callable[[LearnerTask], PassOutcome]
FLOAT_BYTES = 4


class Kernel(Protocol):
    """One way to do the arithmetic; the same task gives the same bits whatever was trained before it."""

    @property
    def backend(self) -> str:
        """Library and version, as results name it."""
        ...

    def trainer(self, base: TailBase, config: LocalTrainingConfig, objective: str) -> Trainer:
        """A function for one thread that trains checked tasks one after the other."""
        ...

    def working_bytes(self, layout: TailLayout, trunk_width: int, batch_size: int, samples: int) -> int:
        """Memory that training one learner takes beside task and result; an estimate from above."""
        ...


class NumpyKernel:
    """The reference."""

    backend = f"numpy {np.__version__}"

    def trainer(self, base: TailBase, config: LocalTrainingConfig, objective: str) -> Trainer:
        if config.is_private:
            return lambda task: train_privately(config, task, lambda: NumpyPrivateTail(base, config, task), SystemChance())
        return lambda task: train_learner(base, config, task, objective)

    def working_bytes(self, layout: TailLayout, trunk_width: int, batch_size: int, samples: int) -> int:
        trunk = 2 * samples * (layout.feature_dim + 3 * trunk_width)
        widths = layout.feature_dim + sum(5 * block.units for block in layout.blocks)
        heads = 4 * (layout.content.units + layout.path.units + layout.difficulty.units)
        return FLOAT_BYTES * (9 * layout.size + trunk + 2 * batch_size * (widths + heads))


class Compiler:
    """The compiled kernel of this process: loaded from its cache, or compiled in the background.

    Attributes:
        note: why there is no compiled kernel (yet); empty when there is one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernel: Kernel | None = None
        self._failed = False
        self._thread: threading.Thread | None = None
        self.note = "numba has not been loaded yet"

    def kernel_now(self) -> Kernel | None:
        """The kernel if it is there or its cache is warm; else None, and it is being compiled from now on or has failed."""
        with self._lock:
            if self._kernel is None and not self._failed and self._thread is None:
                self._start()
            return self._kernel

    def kernel(self) -> Kernel:
        """The kernel, waiting until it is compiled.

        Raises:
            EngineError: ``no_compiler``: Numba is missing or cannot compile; the message says why.
        """
        self.wait()
        if self._kernel is None:
            raise EngineError(f"backend numba cannot be used: {self.note}", code="no_compiler")
        return self._kernel

    def wait(self) -> None:
        """Load or compile, and return when there is a kernel or a reason why there is none."""
        self.kernel_now()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        """Load a warm cache here and now, or begin to compile."""
        try:
            from aivo_core.engine.compiled_kernel import CompiledKernel

            kernel = CompiledKernel()
            if kernel.is_cached():
                self._finish(kernel)
                return
        except Exception as error:  # noqa: BLE001 - whatever a missing or broken compiler raises, NumPy goes on and says so
            self._fail(error)
            return
        self.note = "numba is compiling"
        # Not a daemon: a process that ends while the compiler runs would crash, and the next would have to begin again.
        self._thread = threading.Thread(target=self._compile, args=(kernel,), name="aivo-engine-compiler")
        self._thread.start()

    def _compile(self, kernel: CompiledKernelLike) -> None:
        try:
            self._finish(kernel)
        except Exception as error:  # noqa: BLE001 - as in _start
            self._fail(error)

    def _finish(self, kernel: CompiledKernelLike) -> None:
        kernel.compile()
        self._kernel, self.note = kernel, ""

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self.note = f"numba cannot be used: {type(error).__name__}: {str(error)[:300]}"
        log.warning("the engine computes with numpy: %s", self.note)

    def forget_thread_after_fork(self) -> None:
        """In a forked child the compiling thread is gone, and its locks may be held for ever: the child uses NumPy."""
        if self._thread is not None and self._kernel is None:
            self._thread, self._failed = None, True
            self._lock = threading.Lock()
            self.note = "numba was compiling when this process was forked"


class CompiledKernelLike(Kernel, Protocol):
    """A kernel that has to be compiled before it is used."""

    def is_cached(self) -> bool:
        """Whether ``compile`` only loads a file."""
        ...

    def compile(self) -> None: ...


compiler = Compiler()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: compiler.forget_thread_after_fork())
