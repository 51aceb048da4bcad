"""``run``, the compiled loop over a program's operations, on one thread or several, as LLVM IR.

Every thread has its share of an operation's tasks, the same part of the image in each operation, so that it
mostly reads what it wrote itself. When it has done them it takes tasks of the others' shares. All wait until
the operation's tasks are done, a short while spinning, then asleep in the kernel. Nobody waits for a thread
that has no task: one that starts late, or whose processor is busy, holds up the others by one task at most.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pipeline.inference.emit import I32, I64, POINTER, VOID, Emitter, Width, i64
from pipeline.inference.kernels import TASK, share
from pipeline.inference.records import CODE, NUM_TASKS, RECORD_FIELDS

SPINS = 2000  # pauses before a thread sleeps: some ten microseconds
# records, their number, arena, input, output, floats from one input and output to the next, number of
# images, number of threads, which of them this is, and the counters that they share
RUN = (POINTER, I64, POINTER, POINTER, POINTER, I64, I64, I64, I64, I64, POINTER)
LINE = 8  # counters that one line of a cache holds: each has a line of its own
FUTEX = {"x86_64": 202, "aarch64": 98}  # number of Linux's system call
WAIT, WAKE = 128, 129  # FUTEX_WAIT_PRIVATE and FUTEX_WAKE_PRIVATE
PAUSE = {"x86_64": "llvm.x86.sse2.pause", "aarch64": "llvm.aarch64.hint"}


def num_counters(num_records: int, num_images: int, num_threads: int) -> int:
    """Return how many 64-bit counters, zero at the start, threads share in one call of ``run``.

    There is one for each image, operation and thread: how many of the thread's tasks are taken. Behind
    them stand the numbers of tasks that are done, and of threads that sleep. Each is followed by the
    rest of a cache line.
    """
    return LINE * (num_records * num_images * num_threads + 2)


def run(module: Any, width: Width, architecture: str) -> None:
    """Add ``run``, which every thread calls with the same arguments (:data:`RUN`)."""
    wait, wake = _wait(module, width, architecture), _wake(module, width, architecture)
    e = Emitter(module, "run", RUN, width)
    records, num_records, arena, inputs, outputs, to_next_input, to_next_output = e.function.args[:7]
    num_images, num_threads, thread, shared = e.function.args[7:]
    b = e.builder
    is_alone = b.icmp_signed("==", num_threads, i64(1))
    done = e.address(shared, b.mul(b.mul(b.mul(num_records, num_images), num_threads), i64(LINE)), 8)
    sleepers = e.address(done, i64(LINE), 8)
    with e.loop(i64(0), num_images, [i64(0)]) as image:
        given = e.address(inputs, b.mul(image.index, to_next_input))
        output = e.address(outputs, b.mul(image.index, to_next_output))
        with e.loop(i64(0), num_records, image.values) as turn:
            record = e.address(records, b.mul(turn.index, i64(RECORD_FIELDS)), 8)
            code, num_tasks = e.field(record, CODE), e.field(record, NUM_TASKS)
            goal = b.add(turn.values[0], num_tasks)  # of tasks done when this operation is over
            turn.next = [goal]

            def alone() -> list[Any]:
                with e.loop(i64(0), num_tasks) as task:
                    e.call(code, TASK, [record, arena, given, output, task.index])
                return []

            def together() -> list[Any]:
                number = b.add(b.mul(image.index, num_records), turn.index)
                with e.loop(i64(0), num_threads) as turns:
                    whose = b.srem(b.add(thread, turns.index), num_threads)
                    first, end = share(e, num_tasks, whose, num_threads)
                    taken = e.address(shared, b.mul(b.add(b.mul(number, num_threads), whose), i64(LINE)), 8)
                    with e.repeat() as leave:
                        task = b.add(first, b.atomic_rmw("add", taken, i64(1), "monotonic"))
                        leave(b.icmp_signed(">=", task, end))
                        e.call(code, TASK, [record, arena, given, output, task])
                        before = b.atomic_rmw("add", done, i64(1), "seq_cst")
                        is_over = b.icmp_signed("==", b.add(before, i64(1)), goal)
                        e.either(is_over, wake_others, list)
                b.call(wait, [done, sleepers, goal])
                return []

            def wake_others() -> list[Any]:
                b.call(wake, [done, sleepers])
                return []

            e.either(is_alone, alone, together)
        image.next = turn.values
    e.finish()


def _futex(module: Any) -> Any:
    if "syscall" in module.globals:
        return module.globals["syscall"]
    return ir.Function(module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")


def _wake(module: Any, width: Width, architecture: str) -> Any:
    e = Emitter(module, "wake", (POINTER, POINTER), width, is_exported=False)
    done, sleepers = e.function.args
    b = e.builder

    def call() -> list[Any]:
        everybody = ir.Constant(I32, 2**31 - 1)
        b.call(_futex(module), [i64(FUTEX[architecture]), done, ir.Constant(I32, WAKE), everybody])
        return []

    e.either(e.is_set(b.load_atomic(sleepers, "seq_cst", 8, typ=I64)), call, list)
    e.finish()
    return e.function


def _wait(module: Any, width: Width, architecture: str) -> Any:
    e = Emitter(module, "wait", (POINTER, POINTER, I64), width, is_exported=False)
    done, sleepers, goal = e.function.args
    b = e.builder
    kinds, arguments = ([I32], [ir.Constant(I32, 1)]) if architecture == "aarch64" else ([], [])
    pause = ir.Function(module, ir.FunctionType(VOID, kinds), PAUSE[architecture])

    def is_over() -> Any:
        return b.icmp_signed(">=", b.load_atomic(done, "seq_cst", 8, typ=I64), goal)

    left = e.function.append_basic_block("over")
    with e.loop(i64(0), i64(SPINS)):
        spin = e.function.append_basic_block("spin")
        b.cbranch(is_over(), left, spin)
        b.position_at_end(spin)
        b.call(pause, arguments)
    b.atomic_rmw("add", sleepers, i64(1), "seq_cst")
    with e.repeat() as leave:
        seen = b.load_atomic(done, "seq_cst", 8, typ=I64)
        leave(b.icmp_signed(">=", seen, goal))
        # it returns at once if another thread has changed the number meanwhile
        timeout = ir.Constant(POINTER, None)
        b.call(_futex(module), [i64(FUTEX[architecture]), done, ir.Constant(I32, WAIT), b.trunc(seen, I32), timeout])
    b.atomic_rmw("sub", sleepers, i64(1), "seq_cst")
    b.branch(left)
    b.position_at_end(left)
    e.finish()
    return e.function
